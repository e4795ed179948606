"""Object-aware questions and detection: what is asked is true, boxes come back, and draws are fair."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from vlm_adapt.config import schema
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.tasks.task import make_task

VOCABULARY = ["cat", "dog", "bus", "tree", "boat", "Cat", " "]
PRESENT = ["cat", "bus", "cat", "cat"]
SIZE = (200, 100)


def objects(*labels: str, box: Any = (10, 20, 50, 60)) -> dict[str, Any]:
    return {"objects": [{"label": label, "box": list(box)} for label in labels]}


def task(name: str, **more: Any) -> Any:
    return make_task(schema.Task(name=name, **more))


def aware(seed: int, record: Any = None, **more: Any) -> dict[str, tuple[str, str]]:
    made = task("object_aware", **({"vocabulary": VOCABULARY} | more))
    told = made.training(record or objects(*PRESENT), np.random.default_rng(seed))
    return {q["kind"]: (q["question"].split(": ", 1)[1], q["answer"]) for q in told.record["questions"]}


def test_listing_and_counting() -> None:
    assert aware(0)["listing"] == ("What objects are in the image?", "cat, bus")
    counted = {aware(seed)["counting"] for seed in range(20)}
    assert counted == {("How many cat?", "3"), ("How many bus?", "1")}


def test_presence_is_true_and_as_often_yes_as_no() -> None:
    answers: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for seed in range(400):
        question, answer = aware(seed)["presence"]
        match = re.fullmatch("Is (.*) in the image[?]", question)
        assert match and answer == ("yes" if match.group(1) in PRESENT else "no")
        answers[answer] += 1
        names[match.group(1)] += 1
    assert abs(answers["yes"] - 200) < 50  # 5 standard deviations of a binomial of 400 and 1/2
    assert set(names) == {"cat", "bus", "dog", "tree", "boat"}  # "Cat" is "cat", " " is none
    # A third of about 200 each for what is absent; 5 standard deviations are 34, and those of the 200 again.
    assert all(abs(names[name] - 67) < 45 for name in ("dog", "tree", "boat")), names


def test_subset() -> None:
    counts: Counter[int] = Counter()
    for seed in range(300):
        question, answer = aware(seed)["subset"]
        match = re.fullmatch("Which of (.*) are in the image[?]", question)
        assert match
        asked = match.group(1).split(", ")
        there = [name for name in asked if name in PRESENT]
        assert len(set(asked)) == len(asked) and answer == (", ".join(there) or "none")
        assert 3 <= len(asked) <= 4  # with none there, three names are all that are absent
        counts[len(there)] += 1
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 60  # 100 each; 5 deviations are 41


def test_an_image_of_everything_or_nothing() -> None:
    """Presence is asked of what there is a name for; what cannot be asked is left out."""
    nothing = aware(0, {"objects": []})
    assert set(nothing) == {"presence", "subset"} and nothing["presence"][1] == "no"
    assert nothing["subset"][1] == "none"
    whole = [aware(seed, vocabulary=["cat", "bus"]) for seed in range(10)]
    assert {one["presence"][1] for one in whole} == {"yes"}
    with pytest.raises(BadSample, match="no object to ask for"):
        aware(0, {"objects": []}, forms=["listing", "counting"])


def test_where_names_come_from(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n\nelephant \n", encoding="utf-8")
    forms = {"forms": ["presence"], "vocabulary": str(tmp_path / "names.txt")}
    assert {aware(seed, **forms)["presence"][0].split()[1] for seed in range(30)} == {
        "cat",
        "bus",
        "elephant",
    }
    with_labels = objects("cat") | {"labels": ["", "cat", "sky"]}
    drawn = {aware(seed, with_labels, vocabulary=None)["presence"] for seed in range(20)}
    assert drawn == {("Is cat in the image?", "yes"), ("Is sky in the image?", "no")}
    capitals = {aware(seed, objects("CAT"), vocabulary=["cat", "dog"])["presence"] for seed in range(30)}
    assert capitals == {("Is CAT in the image?", "yes"), ("Is dog in the image?", "no")}
    with pytest.raises(BadSample, match="give the task a vocabulary, or samples labels"):
        aware(0, objects("cat"), vocabulary=None)
    assert set(aware(0, objects("cat"), vocabulary=None, forms=["listing"])) == {"listing"}


def test_words_are_the_users() -> None:
    more = {"presence": "Ist {object} da?", "yes_answer": "ja", "no_answer": "nein", "separator": " und "}
    said = [aware(seed, **more) for seed in range(20)]
    assert {one["presence"][1] for one in said} == {"ja", "nein"}
    assert said[0]["listing"][1] == "cat und bus"
    made = task("object_aware", vocabulary=VOCABULARY, style="paligemma", forms=["listing"])
    told = made.evaluation(objects("cat")).record["questions"]
    assert told == [
        {"question": "answer en What objects are in the image?", "answer": "cat", "kind": "listing"}
    ]


def detect(record: Any, seed: int | None = None, size: Any = SIZE, **more: Any) -> dict[str, Any]:
    made = task("detection", **more)
    if seed is None:
        return made.evaluation(record, [size]).record
    return made.training(record, np.random.default_rng(seed), [size]).record


def test_detection_by_hand() -> None:
    """y0 x0 y1 x1, in 1024 bins: 20 of 100 is round(0.2 * 1023), 10 of 200 round(0.05 * 1023)."""
    record = {"objects": [{"label": "a dog", "box": [10, 20, 200, 100]}, *objects("cat")["objects"]]}
    assert detect(record) == {
        "question": "detect a dog ; cat",
        "answer": "<loc0205><loc0051><loc1023><loc1023> a dog ; <loc0205><loc0051><loc0614><loc0256> cat",
    }
    assert detect(objects("cat"), coordinates="numbers", bins=101)["answer"] == "20 5 60 25 cat"


def test_order_is_drawn_in_training_and_fixed_in_evaluation() -> None:
    record = {"objects": [{"label": f"l{n % 3}", "box": [n, 0, n + 1, 9]} for n in range(6)]}
    seen = {detect(record, seed)["answer"] for seed in range(30)}
    assert len(seen) > 20 and len({tuple(sorted(text.split(" ; "))) for text in seen}) == 1
    assert len({detect(record, seed)["question"] for seed in range(100)}) == 6
    whole = detect(record)
    assert whole["question"] == "detect l0 ; l1 ; l2"
    read, _ = task("detection").read(whole["answer"], SIZE)
    assert [one.label for one in read] == ["l0", "l1", "l2"] * 2


def test_most_objects_leaves_out_whole_names() -> None:
    """An object is never missing from an answer whose name was asked for."""
    record = objects("a", "a", "a", "b", "b", "c")
    asked = set()
    for seed in range(40):
        told = detect(record, seed, most_objects=3)
        names = told["question"].removeprefix("detect ").split(" ; ")
        counts = Counter(one.label for one in task("detection").read(told["answer"], SIZE)[0])
        assert counts == {name: {"a": 3, "b": 2, "c": 1}[name] for name in names}
        asked.add(tuple(sorted(names)))
    assert asked == {("a",), ("b", "c")}
    assert len(detect(record, most_objects=3)["answer"].split(" ; ")) == 6
    with pytest.raises(BadSample, match="more objects than most_objects"):
        detect(objects("a", "a"), 0, most_objects=1)


def test_absent_names_are_asked_for() -> None:
    told = detect(objects("cat"), 0, absent=2, vocabulary=VOCABULARY)
    names = told["question"].removeprefix("detect ").split(" ; ")
    assert len(names) == 3 and "cat" in names and "Cat" not in names
    assert told["answer"].count(" ; ") == 0
    first, again = (detect(objects("cat"), absent=2, vocabulary=VOCABULARY) for _ in range(2))
    assert first == again and first["question"].count(" ; ") == 2


def test_detection_refusals() -> None:
    with pytest.raises(BadSample, match="needs an object"):
        detect({"objects": []})
    with pytest.raises(BadSample, match="needs exactly one image: the sample has 2"):
        task("detection").evaluation(objects("a"), [SIZE, SIZE])
    with pytest.raises(BadSample, match="holds ';'"):
        detect(objects("a;b"))
    with pytest.raises(BadSample, match=r"a box leaves its image: \[10, 20, 50, 60\] in 30 x 100"):
        detect(objects("a"), size=(30, 100))
    assert detect(objects("a", box=(-0.6, 0, 30.4, 99)), size=(30, 100))["answer"].startswith("<loc0000><loc")


boxes = some.tuples(*[some.floats(0, 1)] * 4)
labels = some.text("ab 7\"'<>é", min_size=1, max_size=8).map(str.strip).filter(bool)
sizes = some.tuples(some.integers(1, 5000), some.integers(1, 5000))


@settings(max_examples=200, deadline=None)
@given(
    items=some.lists(some.tuples(labels, boxes), min_size=1, max_size=5),
    size=sizes,
    style=some.sampled_from(["loc", "numbers"]),
    bins=some.sampled_from([2, 100, 1024, 10_000]),
)
def test_boxes_come_back(items: Any, size: tuple[int, int], style: str, bins: int) -> None:
    width, height = size
    given = [
        (
            label,
            [min(a, c) * width, min(b, d) * height, max(a, c) * width, max(b, d) * height],
        )
        for label, (a, b, c, d) in items
    ]
    made = task("detection", coordinates=style, bins=bins)
    found, unread = made.read(made.write(given, size), size)
    assert unread == 0 and [one.label for one in found] == [label for label, _ in given]
    half = np.array([width, height, width, height]) / (2 * (bins - 1))
    for one, (_, box) in zip(found, given, strict=True):
        assert (np.abs(np.array(one.box) - box) <= half * (1 + 1e-9)).all()  # 1e-9: of the arithmetic


@pytest.mark.parametrize(
    ("text", "count", "unread"),
    [
        ("", 0, 0),
        (" ; ", 0, 0),
        ("a cat", 0, 1),
        ("<loc0000><loc0001><loc0002><loc0003>", 0, 1),  # no label
        ("<loc0000><loc0001><loc0002> cat", 0, 1),
        ("<loc0000><loc0001><loc0002><loc1024> cat", 0, 1),  # no such bin
        ("<loc0003><loc0001><loc0002><loc0004> cat", 0, 1),  # upside down
        (
            "<loc0000> <loc0001> <loc0002> <loc0003> cat; nothing ;<loc0000><loc0001><loc0002><loc0003> b c",
            2,
            1,
        ),
    ],
)
def test_what_a_model_may_write(text: str, count: int, unread: int) -> None:
    found, left = task("detection").read(text, SIZE)
    assert (len(found), left) == (count, unread)
