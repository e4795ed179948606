"""The rules by which Stanford CoreNLP 3.4.1 cuts English into Penn Treebank tokens, as a table.

The facts (which abbreviations keep their full stop, where a clitic is cut off, how quotes are spelt) are
those of its PTBTokenizer with the default options; checked against it, token for token. Knows nothing about
captions, lowercasing or punctuation: ptb_tokenizer.py runs the rules.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

# Words whose full stop belongs to them. Matched in any case, unless a capital stands in a class ("[M]iss").
MONTHS_AND_DAYS = "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu(?:rs)?|Fri"
STATES = (
    "Ala|Ariz|{A}z|{A}rk|Calif|Colo|Conn|Ct|Dak|{D}el|Fla|Ga|{I}ll|Ind|Kans?|Ky|{L}a|{M}ass|Md|Mich|Minn|"
    "{M}iss|Mo|Mont|Neb|Nev|Okla|{O}re|{P}a|Penn|Tenn|{T}ex|Va|Vt|{W}ash|Wisc?|Wyo"
)
COMPANIES = "Inc|Cos?|Corp|Pp?t[ye]s?|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys"
AFTER_NAMES = r"Jr|Sr|Bros|(?:Ed|Ph)\.D|Blvd|Rd|Esq|tel|est|ext|sq|etc|al|seq|Bldg"
TITLES = (
    "Mr|Mrs|Ms|{M}iss|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt|"
    "Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|"
    r"Msgr|Sfc|vs|Alex|Wm|Jos|Cie|a\.k\.a|cf|TREAS|Ph|Invt|Elec|Natl|M[ft]g|Dept"
)
BEFORE_NUMBERS = "ca|figs?|prop|nos?|art|bldg|pp|op"
SENTENCE_STARTERS = (
    "About|According|Additionally|After|An|A|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|"
    r"Mr\.|Ms\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|"
    "When|While|What|Yet|You"
)
FILE_ENDINGS = (
    "bat|bmp|cgi|class|cpp|c|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|"
    "sql|tar|txt|wav|xml|x|zip"
)
FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}


class Rule(NamedTuple):
    pattern: re.Pattern[str]  # group 1 is the token, the rest of the match is what it looks ahead at
    text: Callable[[str], str] | None  # how the token is spelt; None drops it
    keep: int  # characters of the token to use: 0 all, n the first n, -n all but n (read again)


def _class_of(wanted: Callable[[str, str], bool]) -> str:
    """The inside of a regular expression's class: the characters of the basic plane that are wanted."""
    runs: list[list[int]] = []
    for code in range(0x10000):
        if wanted(chr(code), unicodedata.category(chr(code))):
            if runs and runs[-1][1] == code - 1:
                runs[-1][1] = code
            else:
                runs.append([code, code])
    return "".join(f"\\u{a:04x}-\\u{b:04x}" for a, b in runs)


def _any_case(pattern: str) -> str:
    return f"(?ai:{pattern})"


def _exact_capitals(pattern: str) -> str:
    return re.sub(r"\{(\w)\}", r"(?-i:\1)", pattern)


def _spaces_fixed(token: str) -> str:
    return token.replace(" ", "\u00a0")


def _brackets(token: str) -> str:
    return token.replace("(", "-LRB-").replace(")", "-RRB-")


def _ampersand(token: str) -> str:
    return re.sub("(?i)&amp;", "&", token)


def _no_soft_hyphens(token: str) -> str:
    return token.replace("\u00ad", "") or "-"


def _quotes(token: str) -> str:
    token = token.replace("&apos;", "'").replace("&quot;", "''").replace('"', "''")
    token = re.sub("[\u0091\u2018\u201b\u2039]", "`", token)
    token = re.sub("[\u0092\u2019\u203a]", "'", token)
    token = re.sub("[\u0093\u201c\u00ab]", "``", token)
    return re.sub("[\u0094\u201d\u00bb]", "''", token)


def _currency(token: str) -> str:
    token = token.replace("\u00a2", "cents").replace("\u00a3", "#")
    return re.sub("[\u0080\u00a4\u20a0\u20ac]", "$", token)


def _same(token: str) -> str:
    return token


@lru_cache(maxsize=1)
def rules() -> tuple[Rule, ...]:
    """The rules in order of precedence; built once, at first use (0.15 s)."""
    plain = _class_of(lambda c, category: category[0] == "L")
    marks = _class_of(lambda c, category: category in ("Mn", "Mc") and 0x300 <= ord(c) <= 0xECD)
    letter = rf"(?:[{plain}{marks}\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02ff]" + (
        r"|&[aeiouAEIOU](?ai:acute|grave|uml);)"
    )
    digit = r"[\d\u07c0-\u07c9]"
    space, gap = r"[ \t\u00a0\u2000-\u200a\u3000]", r"[ \t\u00a0\u2000-\u200a\u3000\n]"
    either = rf"[{plain}\d]"
    apostrophe = r"(?:['\u0092\u2019]|(?ai:&apos;))"
    apostrophe_or_tick = rf"(?:{apostrophe}|[`\u0091\u2018\u201b])"
    word = rf"{letter}(?:{letter}|{digit})*(?:[.!?]{letter}(?:{letter}|{digit})*)*"
    clitic = rf"{apostrophe}(?:(?ai:re|ve|ll)|[msdMSD])"
    not_clitic = rf"(?ai:n){apostrophe_or_tick}(?ai:t)"
    number = rf"(?:{digit}*(?:[.:,\u00ad\u066b\u066c]{digit}+)+|{digit}+)"
    nationals = _any_case(r"(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R)")
    acronym = rf"(?:{nationals}|[A-Za-z](?:\.[A-Za-z])*)"
    long_acronym = rf"(?:{nationals}|[A-Za-z](?:\.[A-Za-z])+)"
    attribute = r"[A-Za-z][\w:.\-]*(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?"
    tag = rf"<(?:[!?][A-Za-z\-][^>\n]*|[A-Za-z][\w:.\-]*(?: +{attribute})* */?|/[A-Za-z][\w:.\-]*) *>"
    abbreviation = _any_case(_exact_capitals(f"{MONTHS_AND_DAYS}|{STATES}|{COMPANIES}|{AFTER_NAMES}"))
    title = f"(?:{_any_case(_exact_capitals(TITLES))}|{acronym})"
    prefix = rf"(?:[dDoOlL]{apostrophe_or_tick}{either})?"
    thing = rf"{prefix}{either}+(?:[-_\u058a\u2010\u2011]{prefix}{either}+)*"
    pair = r"[A-Z]+(?:(?:[+&]|(?ai:&amp;))[A-Z]+)+"
    hyphenated = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{long_acronym}\.|[A-Za-z0-9\u00ad]+))+"
    french = rf"[{plain}]+[aeiouyAEIOUY]{apostrophe_or_tick}[aeiouA-Z][{plain}]*"
    with_apostrophe = "|".join(
        [
            rf"{apostrophe}(?ai:n){apostrophe}?",
            rf"(?ai:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o{apostrophe_or_tick}o)",
            rf"(?ai:Dunkin|somethin|ol){apostrophe}",
            rf"{apostrophe}(?ai:em|till?|cause|[2-9]0s)",
            rf"[A-HJ-XZn]{apostrophe_or_tick}[{plain}]{{2,}}",
            french,
            rf"[lLdDjJ]{apostrophe}",
        ]
    )
    host = r"(?:(?ai:www\.)(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|" + (
        r"(?:[^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+(?ai:com|net|org|edu))"
    )
    mail = r"(?:(?ai:&lt;)|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0{}]*@" + (
        r"(?:[^ \t\n\f\r\"<>|(){}.\u00a0]+\.)*[^ \t\n\f\r\"<>|(){}.\u00a0]+(?:(?ai:&gt;)|>)?"
    )
    phone = r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])" + (
        r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"
    )
    slashed = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
    brackets_named = r"-(?:RRB|LRB|RCB|LCB|RSB|LSB)-|C\.D\.s|pro-|anti-|S(?:&|&amp;)P-500|S(?:&|&amp;)Ls"
    symbols = (
        r"[+%&~^|\\\u00a6\u00a7\u00a8\u00a9\u00ac\u00ae\u00af\u00b0-\u00b4\u00b5-\u00ba\u00d7\u00f7\u0387\u05be"
        r"\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u066a\u066d"
        r"\u0703-\u070d\u07f6-\u07f8\u0964\u0965\u0e4f\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b"
        r"\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e\u2100-\u214f\u2190-\u2bff\u3012\u30fb\uff01-\uff0f"
        r"\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
    )
    raised_sign = r"[\u207a\u207b\u208a\u208b]"
    file_name = rf"(?:{letter}|{digit})+(?:\.(?:{letter}|{digit})+)*\.(?ai:{FILE_ENDINGS})"
    face = r"[\-^x=~<>']"
    table: list[tuple[str, str, Callable[[str], str] | None, int]] = [
        (r"c\+\+|C\+\+|[cCfF]#", "", _same, 0),
        (_any_case("cannot"), "", _same, 3),
        (_any_case("'twas|'tis"), "", _same, 2),
        (_any_case("gonna|gotta|lemme|gimme|wanna"), "", _same, 3),
        (tag, "", _spaces_fixed, 0),
        (r"&(?ai:MD|mdash|ndash);|[\u0096\u0097\u2013-\u2015]", "", lambda _: "--", 0),
        (_any_case("&amp;"), "", lambda _: "&", 0),
        (_any_case("&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"), "", _same, 0),
        (word, clitic, _no_soft_hyphens, 0),
        (r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", not_clitic, _no_soft_hyphens, 0),
        (word, "", _no_soft_hyphens, 0),
        (with_apostrophe, "", _same, 0),
        (rf"[yY]{apostrophe}", rf"[{plain}]", _same, 0),
        (r"(?ai:https?)://[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},-]", "", _same, 0),
        (rf"{host}(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){{}},-])?", "", _same, 0),
        (mail, "", _same, 0),
        (rf"@[a-zA-Z_][a-zA-Z_0-9]*|\#{letter}+", "", _same, 0),
        (clitic, "[^A-Za-z]", _quotes, 0),
        (not_clitic, "[^A-Za-z]", _quotes, 0),
        (rf"{digit}{{1,2}}[-/]{digit}{{1,2}}[-/]{digit}{{2,4}}", "", _same, 0),
        (rf"[-+]?{number}", "", _no_soft_hyphens, 0),
        (rf"{raised_sign}?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)", "", _same, 0),
        (rf"(?:{digit}{{1,4}}[- \u00a0])?{digit}{{1,4}}(?:\\?/|\u2044){digit}{{1,4}}", "", _spaces_fixed, 0),
        (r"[\u00bc\u00bd\u00be\u2153-\u215e]", "", lambda token: FRACTIONS.get(token, token), 0),
        (rf"(?ai:{brackets_named})|(?ai:Cap{apostrophe}n|c{apostrophe}est)", "", _ampersand, 0),
        (slashed, "", _same, 0),
        (r"[A-Z]*\$|\#", "", _same, 0),
        (
            r"[\u00a2-\u00a5\u0080\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]",
            "",
            _currency,
            0,
        ),
        (r"[A-Za-z]\.", rf"{gap}+(?:{SENTENCE_STARTERS}|{tag}){gap}", _same, 1),
        (rf"{acronym}\.", rf"{gap}+(?:{SENTENCE_STARTERS}|{tag}){gap}", _same, 0),
        (rf"{_any_case(BEFORE_NUMBERS)}\.", rf"{gap}?\d", _same, 0),
        (r"(?:(?ai:pt)[eyEY]|(?ai:co))\.", rf"{space}(?ai:ltd|lim)", _same, 0),
        (rf"{abbreviation}\.", r"(?:[\s\S]{2})?", _same, 0),
        (rf"{title}\.", "", _same, 0),
        (title, space, _same, 0),
        (acronym, gap, _same, 0),
        (rf"{apostrophe}[0-9]{{2}}", gap, _same, 0),
        (file_name, rf"(?:{gap}|[.?!,])", _same, 0),
        (rf"(?:{word})\.", r"[,;:\u3001]", _no_soft_hyphens, 0),
        (phone, "", lambda token: _brackets(_spaces_fixed(token)), 0),
        (r"\"|(?ai:&quot;)", "[A-Za-z0-9$]", lambda _: "``", 0),
        (r"\"|(?ai:&quot;)", "", lambda _: "''", 0),
        (r"<|(?ai:&lt;)", "", lambda _: "<", 0),
        (r">|(?ai:&gt;)", "", lambda _: ">", 0),
        (r"[<>]?[:;=][-oO*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]", _brackets, 0),
        (rf"{face}_{face}|\({face}[_.]?{face}\)|\([\^x=~<>']-[\^x=~<>'`]\)", "", _brackets, 0),
        (r"\{", "", lambda _: "-LCB-", 0),
        (r"\}", "", lambda _: "-RCB-", 0),
        (r"\[", "", lambda _: "-LSB-", 0),
        (r"\]", "", lambda _: "-RSB-", 0),
        (r"\(", "", lambda _: "-LRB-", 0),
        (r"\)", "", lambda _: "-RRB-", 0),
        (r"-+", "", lambda token: "--" if len(token) in (3, 4) else token, 0),
        (r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026]", "", lambda _: "...", 0),
        (r"@+|\#+|_+|\*+|(?:\\\*){1,3}|[,;:\u3001]|[?!]+|=|/", "", _same, 0),
        (r"[.\u00a1\u00bf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002]", "", _same, 0),
        (rf"{hyphenated}\.", r"[,;:\u3001]", _no_soft_hyphens, 0),
        (hyphenated, "", _no_soft_hyphens, 0),
        (rf"(?:{thing})\.", r"[,;:\u3001]", _same, 0),
        (thing, "", _same, 0),
        (rf"(?:{pair})\.", r"[,;:\u3001]", _ampersand, 0),
        (pair, "", _ampersand, 0),
        ("'", r"[A-Za-z][^ \t\n\r\u00a0]", lambda _: "`", 0),
        (rf"{clitic}|{not_clitic}", "", _quotes, 0),
        (
            rf"''|[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{{1,2}}|{apostrophe}",
            "",
            _quotes,
            0,
        ),
        (rf"<<|>>|{symbols}", "", _same, 0),
        (rf"{space}+|[\0\x7f\u200b\u200e\u200f\ufeff]|(?ai:&nbsp;)", "", None, 0),
    ]
    return tuple(Rule(re.compile(f"({body})(?:{after})"), text, keep) for body, after, text, keep in table)
