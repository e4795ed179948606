"""Caption metrics: hand-worked scores, and pycocoevalcap 1.2's own numbers on captions written here."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_adapt.errors import UserError
from vlm_adapt.metrics import METRICS, SAMPLE_SCORES
from vlm_adapt.metrics import meteor as meteor_module
from vlm_adapt.metrics.bleu import corpus_bleu
from vlm_adapt.metrics.caption import sample_scores, score
from vlm_adapt.metrics.cider import cider_d
from vlm_adapt.metrics.ptb_tokenizer import tokenize
from vlm_adapt.metrics.rouge import longest_common_subsequence, rouge_l

PREDICTIONS = [
    "Two dogs run along the beach.",
    "A woman's red bicycle leans on a wall",
    "a plate with half-eaten toast, eggs & tea",
    "people wait for the bus at 8:25 p.m.",
]
REFERENCES = [
    [
        "Two brown dogs are running along the beach",
        "A pair of dogs runs on the sand.",
        "Dogs don't stop running by the sea!",
    ],
    ["A red bicycle is leaning against a brick wall.", "The woman's bike (red) leans on a wall"],
    [
        "A plate of toast and eggs next to a cup of tea",
        "half-eaten toast, two eggs and tea on a plate",
        "Breakfast: eggs, toast; tea.",
    ],
    ["People are waiting at a bus stop at night", "Some people wait for the 8:25 bus"],
]
# Computed with pycocoevalcap 1.2 (Java tokenizer) on the eight lines above.
OFFICIAL = {
    "BLEU-1": 0.8165505420928584,
    "BLEU-2": 0.5832983893795696,
    "BLEU-3": 0.4108357626941084,
    "BLEU-4": 0.28761764762844555,
    "ROUGE-L": 0.6508423235726644,
    "CIDEr": 2.091788512900217,
}
OFFICIAL_METEOR = 0.40759279022750106
OFFICIAL_CIDER = [1.3083221275170411, 2.5316568995060025, 1.6404847400220235, 2.8866902845558013]

# Read off pycocoevalcap's PTBTokenizer. "Row b." depends on the line after it, as there.
TOKENS = [
    ("The man's dog can't sit; it won't!", "the man 's dog ca n't sit it wo n't"),
    (
        'A half-eaten t-shirt-wearing bear\'s "lunch" (tasty) [sic]',
        "a half-eaten t-shirt-wearing bear 's lunch -lrb- tasty -rrb- -lsb- sic -rsb-",
    ),
    (
        "Mr. Lee in the U.S. at 5 p.m., 3.5 m & 1,000 birds",
        "mr. lee in the u.s. at 5 p.m. 3.5 m & 1,000 birds",
    ),
    (
        "skating/skiing 1/2 or 2 1/2 cups -- “nice” café – ok...",
        "skating/skiing 1/2 or 2\xa01/2 cups nice café ok",
    ),
    (
        "I cannot wait, gonna go :) \U0001f600 what?? #1 B&W and b&w",
        "i can not wait gon na go :-rrb- what ?? # 1 b&w and b & w",
    ),
    ("one --- two ----- three .. four", "one two ----- three four"),
    ("", ""),
    ("Row b.", "row b"),
    ("The end", "the end"),
    ("Row b.", "row b."),
    ("no end", "no end"),
]


def test_tokens_equal_those_of_the_java_tokenizer() -> None:
    assert list(zip([c for c, _ in TOKENS], tokenize([c for c, _ in TOKENS]), strict=True)) == TOKENS


def test_a_line_break_in_a_caption_does_not_shift_the_others() -> None:
    assert tokenize(["a\r\nb\u2028c\nd", "e"]) == ["a b c d", "e"]
    assert tokenize([]) == []


def test_scores_equal_pycocoevalcap() -> None:
    ours = score(PREDICTIONS, REFERENCES)
    # 1e-12: the same sums of doubles in another order
    assert {k: ours[k] for k in OFFICIAL} == pytest.approx(OFFICIAL, abs=1e-12)
    assert sample_scores(PREDICTIONS, REFERENCES) == pytest.approx(OFFICIAL_CIDER, abs=1e-12)
    assert ours["samples"] == 4
    assert ("METEOR" in ours) != ("METEOR" in ours.get("absent", {}))


def test_bleu_by_hand() -> None:
    # "the the the" against "the cat sat": one "the" counts of three; no word pair is shared.
    one, two, _, _ = corpus_bleu(["the the the"], [["the cat sat"]])
    assert one == pytest.approx(1 / 3) and two < 1e-6
    # 3 words against references of 5 and 1 words: both are 2 away, the shorter counts, so no brevity penalty.
    assert corpus_bleu(["a b c"], [["a b c d e", "a"]])[0] == pytest.approx(1.0)
    # 2 words against 4: exp(1 - 4/2)
    assert corpus_bleu(["a b"], [["a b c d"]])[0] == pytest.approx(math.exp(-1), abs=1e-8)


def test_rouge_by_hand() -> None:
    assert longest_common_subsequence("a b c d".split(), "b x d a".split()) == 2
    # common 2 ("a", "c"): precision 2/3 and recall 2/4; F with beta^2 = 1.44
    assert rouge_l("a b c", ["a x c y"]) == pytest.approx(2.44 * (2 / 3) * 0.5 / (0.5 + 1.44 * 2 / 3))
    assert rouge_l("a", ["b"]) == 0.0


def test_cider_by_hand() -> None:
    # Two samples, unlike each other: every n-gram has weight log 2, so a perfect copy has cosine 1 for the n
    # that it is long enough for: 2 words give n = 1 and 2, so 10 * 2/4.
    assert cider_d(["a b", "c d e f"], [["a b"], ["c d e f"]]) == pytest.approx([5.0, 10.0])
    # One word more than the reference: 1 pair against 2, cosines 2/sqrt(2*3), 1/sqrt(2), 0, 0.
    expected = 10 / 4 * (2 / math.sqrt(6) + 1 / math.sqrt(2)) * math.exp(-1 / 72)
    assert cider_d(["a b x", "c"], [["a b"], ["d"]])[0] == pytest.approx(expected)
    assert cider_d(["a b c d"], [["a b c d"]]) == [0.0]  # a set of one has no document frequencies


def test_meteor_says_why_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor_module.shutil, "which", lambda name: None)
    assert "java" in score(["a"], [["a"]])["absent"]["METEOR"]
    monkeypatch.setattr(meteor_module.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(meteor_module, "find_jar", lambda: None)
    assert "pycocoevalcap" in score(["a"], [["a"]])["absent"]["METEOR"]


@pytest.mark.skipif(meteor_module.why_absent() is not None, reason=str(meteor_module.why_absent()))
def test_meteor_equals_pycocoevalcap() -> None:
    assert score(PREDICTIONS, REFERENCES)["METEOR"] == pytest.approx(OFFICIAL_METEOR, abs=1e-12)


def test_bad_input_is_one_sentence() -> None:
    for arguments, word in [
        (([], []), "empty"),
        ((["a"], []), "1 predictions but 0"),
        ((["a"], [[]]), "sample 0"),
        ((["a"], ["a"]), "one string"),
        ((["a"], [["a"]], ["x", "y"]), "2 kinds"),
    ]:
        with pytest.raises(UserError, match=word):
            score(*arguments)


def test_tables_load_and_need_no_torch() -> None:
    code = (
        "import sys; from vlm_adapt.metrics import METRICS, SAMPLE_SCORES\n"
        "[t.load(n) for t in (METRICS, SAMPLE_SCORES) for n in t]\n"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
    assert set(METRICS) == set(SAMPLE_SCORES)


ANNOTATIONS = Path(__file__).parents[2] / "shared" / "data" / "coco_mini" / "annotations"


@pytest.mark.skipif(
    not ANNOTATIONS.is_dir()
    or shutil.which("java") is None
    or importlib.util.find_spec("pycocoevalcap") is None,
    reason="needs the COCO captions, Java and pycocoevalcap",
)
def test_real_captions_against_the_installed_pycocoevalcap() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions: dict[int, list[str]] = {}
    for split in ("train", "val"):
        for entry in json.loads((ANNOTATIONS / f"captions_{split}.json").read_text())["annotations"]:
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
    everything = list(captions.values())
    guesses, truths = [c[0] for c in everything], [c[1:] for c in everything]
    java = PTBTokenizer()
    theirs = java.tokenize({i: [{"caption": c} for c in t] for i, t in enumerate(truths)})
    assert [c for i in range(len(truths)) for c in theirs[i]] == tokenize([c for t in truths for c in t])
    results = java.tokenize({i: [{"caption": c}] for i, c in enumerate(guesses)})
    ours = score(guesses, truths)
    bleu = Bleu(4).compute_score(theirs, results, verbose=0)[0]
    assert [ours[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu, abs=1e-9)
    assert ours["ROUGE-L"] == pytest.approx(Rouge().compute_score(theirs, results)[0], abs=1e-9)
    assert ours["CIDEr"] == pytest.approx(Cider().compute_score(theirs, results)[0], abs=1e-9)
