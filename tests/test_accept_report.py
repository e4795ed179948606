"""What looking at a real report found: sums counted twice, curves across stages, charts of one point."""

from __future__ import annotations

import json
from pathlib import Path

from vlm_adapt.report.curves import _raw_and_smooth
from vlm_adapt.report.html import write_report


def run_of(folder: Path, evaluations: int) -> Path:
    steps = [
        {"step": n, "stage": "align" if n <= 10 else "tune", "loss": 0.1 if n <= 10 else 4.0}
        for n in range(1, 21)
    ]
    metrics = {"CIDEr": 0.5, "loss": 3.0, "blind_loss": 3.25, "questions": 4, "blind": {"CIDEr": 0.1}}
    events = [{"event": "evaluate", "step": 20 - n, "metrics": metrics} for n in range(evaluations)]
    lines = [json.dumps(line) + "\n" for line in [*steps, *events]]
    (folder / "journal.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    row = {"method": "full", "trainable": 1_234, "frozen": 0}
    rows = [{"part": "connector", **row}, {"part": "all", **row}]
    (folder / "parts.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def test_the_sum_of_parts_is_counted_once(tmp_path):
    page = write_report(run_of(tmp_path, 1)).read_text(encoding="utf-8")
    assert "2,468" not in page and page.count("<td>1,234</td>") == 2


def test_stages_are_smoothed_apart(tmp_path):
    points = [(float(n), 0.1 if n <= 10 else 4.0) for n in range(1, 21)]
    _, smoothed = _raw_and_smooth(points, [(1.0, "align"), (11.0, "tune")])
    assert all(
        abs(y - expected) < 1e-9 for (_, y), (_, expected) in zip(smoothed.points, points, strict=True)
    )
    page = write_report(run_of(tmp_path, 1)).read_text(encoding="utf-8")
    assert "smoothed; first step 4" in page


def test_one_evaluation_is_a_table_and_two_are_a_curve(tmp_path):
    once = write_report(run_of(tmp_path, 1)).read_text(encoding="utf-8")
    assert "Held out: CIDEr" not in once and "<td>3.25</td>" in once
    twice = write_report(run_of(tmp_path, 2)).read_text(encoding="utf-8")
    assert "Held out: CIDEr" in twice and "Held out: questions" not in twice


def test_counts_are_a_sentence_and_no_scores(tmp_path):
    run = run_of(tmp_path, 1)
    counts = {"samples": 8, "questions": 19, "samples_in_shards": 80, "samples_available": 8}
    account = {"read": 9, "used": 8, "truncated": 0, "refused": {"empty answer": 1}}
    (run / "metrics.json").write_text(json.dumps({"loss": 3.0} | counts | {"account": account}))
    page = write_report(run).read_text(encoding="utf-8")
    assert "Scored on 8 samples of 80 in the shards, 19 questions; 1 refused: 1 x empty answer." in page
    assert "samples_in_shards" not in page and ">account<" not in page


def test_a_resume_is_marked_where_it_was(tmp_path):
    run = run_of(tmp_path, 1)
    before = write_report(run).read_text(encoding="utf-8")
    assert "resumed" not in before
    with (run / "journal.jsonl").open("a") as file:
        file.write('{"event": "resume", "step": 14}\n')
    page = write_report(run).read_text(encoding="utf-8")
    share = 100 * (14.5 - 1) / 19  # of the axis, from step 1 to 20
    assert f'<span class="mark-name" style="left:{share:.2f}%">resumed</span>' in page
    with (run / "journal.jsonl").open("a") as file:
        file.write('{"event": "resume", "step": 14}\n' * 5)
    assert ">resumed</span>" not in write_report(run).read_text(encoding="utf-8")
