"""VQA accuracy and exact match: cases worked by hand from the official rules."""

import pytest

from vlm_adapt.errors import UserError
from vlm_adapt.metrics import exact, vqa


def test_leave_one_out_by_hand() -> None:
    # 2 of 10 said "red": left out one of the two (2 subsets), 1 match is left, 1/3; else (8 subsets) 2/3.
    answers = ["red"] * 2 + ["blue"] * 8
    assert vqa.accuracy_of("red", answers) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)  # 0.6
    assert vqa.accuracy_of("blue", answers) == 1.0
    assert vqa.accuracy_of("green", answers) == 0.0
    # 3 of 10: 3 subsets with 2 matches, 7 with 3
    assert vqa.accuracy_of("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)  # 0.9
    assert vqa.accuracy_of("red", ["red"] + ["blue"] * 9) == pytest.approx(9 / 3 / 10)  # 0.3


def test_cleaning_turns_60_0_0_0_into_90_30_30_30() -> None:
    # The official evaluator cleans both sides where people disagree: "2" matches "two" and "2" (3 of 10).
    answers = ["2", "two", "The 2", "cats", "3", "4", "5", "6", "7", "8"]
    assert vqa.accuracy_of("two.", answers) == pytest.approx(0.9)
    assert vqa.accuracy_of("a cats", answers) == pytest.approx(0.3)
    assert vqa.accuracy_of("Three", answers) == pytest.approx(0.3)
    assert vqa.accuracy_of("(4)", answers) == pytest.approx(0.3)


def test_nothing_is_cleaned_where_all_agree() -> None:
    assert vqa.accuracy_of("yes", ["yes"] * 10) == 1.0
    assert vqa.accuracy_of(" yes\n", ["yes"] * 10) == 1.0  # white space is straightened always
    assert vqa.accuracy_of("Yes", ["yes"] * 10) == 0.0
    assert vqa.accuracy_of("two", ["2"] * 10) == 0.0
    assert vqa.accuracy_of("Yes", ["yes"] * 9 + ["no"]) == 1.0


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("The two cats, dont run.", "2 cats don't run"),
        ("black/white", "black white"),  # no space beside the mark: it becomes one
        ("black / white", "black white"),
        ("black/ white-ish", "black white ish"),  # each mark is judged by itself
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits: marks are deleted, not spaced
        ("a man's hat!", "man's hat"),
        ("3.5", "3.5"),
        ("5. avenue", "5 avenue"),
        ("u.s.a.", "usa"),
        (".5", ".5"),
        ("None", "0"),
        ("ten", "10"),
        ("whod've guessed", "who'd've guessed"),
        ("yall'll", "y'all'll"),
        ("Im", "im"),  # in the official table as "Im", which no lowercased word is
        ("somebody'd", "somebodyd"),
        ("." * 40, "." * 8),  # 32 full stops at most
        ("the", ""),
    ],
)
def test_official_cleaning(raw: str, cleaned: str) -> None:
    assert vqa.clean(raw) == cleaned


def test_contractions_are_those_of_the_official_table() -> None:
    assert len(vqa.CONTRACTIONS) == 114  # of 120: four begin with a capital, two stand for themselves
    assert vqa.CONTRACTIONS["shouldnt've"] == "shouldn't've" and "lets" not in vqa.CONTRACTIONS


def test_lists_that_are_not_of_ten() -> None:
    assert vqa.accuracy_of("red", ["red", "red", "red", "blue"]) == pytest.approx((3 * 2 / 3 + 1) / 4)
    assert vqa.accuracy_of("red", ["red"] * 4) == 1.0
    # Fewer than four: as many matches as there are others are enough, so that agreement is worth 1.
    assert vqa.accuracy_of("red", ["red"] * 3) == 1.0
    assert vqa.accuracy_of("red", ["red", "blue"]) == pytest.approx(0.5)
    assert vqa.accuracy_of("Two", ["2"]) == 1.0
    assert vqa.accuracy_of("3", ["2"]) == 0.0


def test_score_by_kind() -> None:
    result = vqa.score(
        ["red", "yes", "no"], [["red"] * 10, ["yes"] * 10, ["yes"] * 10], ["color", "yes_no", "yes_no"]
    )
    assert result["accuracy"] == pytest.approx(2 / 3) and result["samples"] == 3
    assert result["accuracy_by_kind"] == {"color": 1.0, "yes_no": 0.5}
    assert result["samples_by_kind"] == {"color": 1, "yes_no": 2}
    assert "accuracy_by_kind" not in vqa.score(["red"], [["red"] * 10])


def test_exact_match() -> None:
    guesses = ["Blue.", " light  blue ", "circle", "yes..", "u.s."]
    truths = [["blue"], ["Light Blue"], ["square", "circle"], ["yes"], ["u.s"]]
    assert exact.sample_scores(guesses, truths) == [1, 1, 1, 0, 1]
    result = exact.score(guesses, truths, ["color", "color", "shape", "yes_no", None])
    assert result["accuracy"] == pytest.approx(0.8) and result["samples"] == 5
    assert result["accuracy_by_kind"] == {"color": 1.0, "shape": 1.0, "yes_no": 0.0}


def test_bad_input_is_one_sentence() -> None:
    for function in (vqa.score, exact.score):
        with pytest.raises(UserError, match="empty"):
            function([], [])
        with pytest.raises(UserError, match="sample 1 has no reference"):
            function(["a", "b"], [["a"], []])
