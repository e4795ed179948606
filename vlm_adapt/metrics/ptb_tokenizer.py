"""Penn Treebank tokens of captions, the same as pycocoevalcap's but without Java.

pycocoevalcap feeds captions, a line each, to Stanford CoreNLP 3.4.1's PTBTokenizer with `-preserveLines
-lowerCase` and drops a list of punctuation. This file is a small scanner with the same rules: at every
place the rule that matches furthest wins (what it looks ahead at counts), and the earlier rule on a tie.
Knows nothing about metrics. Two things are unlike what one would expect, and kept because scores must be
equal: brackets stay in the text (as `-lrb-`; the list of punctuation names them in capitals, after
lowercasing), and a caption that ends in one letter and a full stop ("row b.") is read with a look at the
first word of the next line. Characters beyond the basic multilingual plane (emoji) are dropped, as there.
One difference: a carriage return or another exotic line break inside a caption is a space here, where
pycocoevalcap would give the rest of the captions to the wrong images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm_adapt.metrics.ptb_rules import rules

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# A word of ASCII letters before a space is a token whatever follows; most of a caption goes this way. (Not
# before a second kind of space: the run of spaces is read as one, and a rule may begin in its middle.)
_EASY = re.compile(r"([A-Za-z]+) +(?=[!-~])")
_SPLIT_WORDS = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
_LINE_BREAKS = re.compile("\r\n|[\r\n\u000b\u000c\u2028\u2029]")


def tokenize(captions: Sequence[str]) -> list[str]:
    """Lowercased Treebank tokens of each caption without punctuation, joined by single spaces.

    Args:
        captions: in the order in which pycocoevalcap would see them (see above why the order can matter).

    Returns:
        A string for each caption, empty where nothing is left of it.
    """
    table = rules()
    text = "\n".join(_LINE_BREAKS.sub(" ", caption) for caption in captions)
    lines: list[list[str]] = [[]]
    at, end = 0, len(text)
    while at < end:
        easy = _EASY.match(text, at)
        if easy and easy[1].lower() not in _SPLIT_WORDS:
            lines[-1].append(easy[1].lower())
            at = easy.end()
            continue
        if text[at] == "\n":
            lines.append([])
            at += 1
            continue
        best, reach, rule = None, at, None
        for candidate in table:
            found = candidate.pattern.match(text, at)
            if found and found.end() > reach:
                best, reach, rule = found, found.end(), candidate
        if best is None or rule is None:  # a character that the Treebank's tokenizer does not know
            at += 1
            continue
        token = best[1][: rule.keep] if rule.keep else best[1]
        at += len(token)
        if rule.text is not None:
            spelt = rule.text(token).lower()
            if spelt not in PUNCTUATION:
                lines[-1].append(spelt)
    return [" ".join(line) for line in lines] if captions else []
