"""Reports: reading a run as it was left, the page, tables, figures."""

import base64
import io
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_adapt.errors import UserError
from vlm_adapt.report.gallery import choose, picture, states
from vlm_adapt.report.html import write_report
from vlm_adapt.report.plots import loss_curve, metric_bars
from vlm_adapt.report.read import read_run
from vlm_adapt.report.series import pick, smooth, spans_decades, thin, ticks
from vlm_adapt.report.tables import markdown_table, plain_table
from vlm_adapt.report.words import duration, number

METRICS = {
    "accuracy": 0.9,
    "accuracy_by_kind": {"color": 0.8, "shape": 1.0},
    "samples": 20,
    "blind": {"accuracy": 0.4, "accuracy_by_kind": {"color": 0.3, "shape": 0.5}},
}


def journal(steps: int = 30) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"event": "start", "config": "tiny.yaml", "hardware": "2 cores", "time": 0.0}
    ]
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "stage": "align" if step <= 10 else "tune",
                "loss": 5.0 / step,
                "grad_norm": 1.0,
                "learning_rate": {"vision": 0.0, "connector": 1e-3},
                "samples": 8 * step,
                "tokens_per_second": 100.0,
                "memory": 2**30,
                "data_wait": 0.01,
                "time": 10.0 * step,
            }
        )
    lines.append({"event": "evaluate", "step": steps, "metrics": METRICS, "time": 10.0 * steps})
    return lines


def write_lines(path: Path, lines: list[dict[str, Any]], end: str = "\n") -> None:
    path.write_text("\n".join(map(json.dumps, lines)) + end)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    write_lines(folder / "journal.jsonl", journal())
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "parts.json").write_text(json.dumps({"vision": {"trainable": 1200, "frozen": 3_000_000}}))
    predictions = []
    for place in range(20):
        Image.new("RGB", (64, 48), (10 * place, 80, 120)).save(folder / "images" / f"{place}.jpg")
        right = place % 5 != 0
        predictions.append(
            {
                "key": f"k{place}",
                "question": "What <b>shape</b> & colour?",
                "answers": ["circle"],
                "prediction": "circle" if right else "<script>alert(1)</script>",
                "blind_prediction": "square",
                "kind": "shape" if place % 2 else "color",
                "score": float(right),
                "image": f"images/{place}.jpg",
            }
        )
    write_lines(folder / "predictions.jsonl", predictions)
    return folder


class Page(HTMLParser):
    """Tags that stay open, attributes that load something, and the cards in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.cards: list[dict[str, str | None]] = []
        self.scripts = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "path", "input", "br"):
            self.open.append(tag)
        self.scripts += tag == "script"
        values = dict(attrs)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if "card" in (values.get("class") or "").split():
            self.cards.append(values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag


def test_page_is_whole_escaped_and_self_contained(run: Path) -> None:
    path = write_report(run)
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert path == run / "report.html" and not list(run.glob("*.partial"))
    assert page.open == [] and page.scripts == 1
    assert len(page.loads) == 20 and all(src.startswith("data:image/jpeg;base64,") for src in page.loads)
    assert "http" not in text.replace("http-equiv", "")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    for expected in ("tiny.yaml", "90.0 %", "40.0 % blind", "+50.0 points", "align", "5 min", "3,000,000"):
        assert expected in text
    outcomes = [card["data-state"] for card in page.cards]
    assert outcomes == ["wrong"] * 4 + ["right"] * 16
    assert {card["data-kind"] for card in page.cards} == {"color", "shape"}


def test_a_killed_run_without_evaluation(run: Path) -> None:
    for name in ("metrics.json", "predictions.jsonl", "parts.json"):
        (run / name).unlink()
    lines = journal(12)[:-1]
    resumed = [*lines, {"event": "resume", "step": 10, "time": 9000.0}, *journal(12)[11:13]]
    for line in resumed[-2:]:
        line["time"] += 8900
    resumed.insert(3, ["not", "a", "record"])  # type: ignore[arg-type]
    write_lines(run / "journal.jsonl", resumed, end='\n{"step": 13, "lo')
    record = read_run(run)
    assert [line["step"] for line in record.steps] == list(range(1, 13))
    # 120 s before the kill; after the resume at 9000 s, steps at 9010 and 9020 s: the pause is not work.
    assert record.elapsed == pytest.approx(120 + 20)
    notes = " ".join(record.notes)
    assert "cut off" in notes and "2 step(s) were run again" in notes
    assert "1 unreadable line(s) of journal.jsonl are left out: 4." in notes and "not been evaluated" in notes
    text = write_report(run, run / "deep" / "page.html").read_text(encoding="utf-8")
    assert "Training loss" in text and "cut off" in text and 'id="samples"' not in text
    assert Page(run / "deep" / "page.html").open == []


def test_an_evaluation_alone_with_captions(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    metrics = {"CIDEr": 0.41, "BLEU-4": 0.2, "absent": {"METEOR": "no `java`"}, "blind": {"CIDEr": 0.05}}
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    write_lines(
        tmp_path / "evaluation" / "predictions.jsonl",
        [{"key": str(s), "answers": ["a dog"], "prediction": "a cat", "score": s} for s in (2.5, 0.1, 1.0)],
    )
    path = write_report(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "0.41" in text and "20.0 %" in text and "no `java`" in text and "no journal.jsonl" in text
    assert [card["data-state"] for card in Page(path).cards] == ["low", "high", "high"]


def test_nothing_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no journal"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{broken")
    with pytest.raises(UserError, match="holds no journal"):
        write_report(tmp_path)


def test_a_loss_that_is_not_finite_is_said_and_not_drawn(run: Path) -> None:
    lines = journal()
    lines[5]["loss"] = math.nan
    lines[6]["learning_rate"] = None
    write_lines(run / "journal.jsonl", lines)
    assert "The loss of 1 step(s) is not a finite number" in " ".join(read_run(run).notes)
    assert ">nan" not in write_report(run).read_text(encoding="utf-8").lower()


def test_pictures_come_from_inside_the_run_only(tmp_path: Path) -> None:
    inside = tmp_path / "run"
    inside.mkdir()
    for place in (inside, tmp_path):
        Image.new("RGB", (900, 600), "red").save(place / "red.png")
    (inside / "text.jpg").write_text("no image")
    found = picture("red.png", inside, inside)
    assert found is not None
    small = Image.open(io.BytesIO(base64.b64decode(found.split(",")[1])))
    assert small.format == "JPEG" and max(small.size) == 320
    assert picture(found, inside, inside) is not None  # a data URI is read and written again
    for bad in (
        "../red.png",
        str(tmp_path / "red.png"),
        "text.jpg",
        "absent.jpg",
        "",
        None,
        "data:text/html,x",
    ):
        assert picture(bad, inside, inside) is None
    assert picture('data:image/png;base64,AAAA"onload="x', inside, inside) is None


def test_samples_are_chosen_from_every_kind_and_outcome() -> None:
    samples = [{"score": 0.0, "kind": "a"}] * 50 + [{"score": 1.0, "kind": "b"}] * 50 + [{"score": 0.3}]
    chosen = choose(samples, 11)
    assert [states(samples)[p] for p in chosen] == ["wrong"] * 5 + ["partly"] + ["right"] * 5
    assert states([{"prediction": "x"}]) == [None]
    assert states([{"score": 0.2}, {"score": 3.0}, {}]) == ["low", "high", None]


def test_curves() -> None:
    assert pick([{"step": 1, "r": {"a": 2}}, {"step": 2, "r": 3}, {"step": 3}], "r", "a") == [(1.0, 2.0)]
    flat = [(float(x), 2.0) for x in range(50)]
    assert [y for _, y in smooth(flat)] == pytest.approx([2.0] * 50)
    line = [(float(x), float(x)) for x in range(201)]
    assert smooth(line)[100][1] == pytest.approx(100)  # two-sided: no lag in the middle
    spike = [(float(x), 100.0 if x == 777 else 0.0) for x in range(5000)]
    assert (777.0, 100.0) in thin(spike) and len(thin(spike)) <= 400
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.05, 20, log=True) == pytest.approx([0.1, 0.3, 1, 3, 10])
    assert ticks(2, 2) == [2] and spans_decades([1, 100]) and not spans_decades([0, 100])


def test_words() -> None:
    values = [0, 7, 1234, 12345, 999_999, 12_345_678, 0.000123, 0.5, 123.4]
    words = ["0", "7", "1234", "12.3 k", "1000 k", "12.3 M", "1.23e-4", "0.5", "123"]
    assert [number(v) for v in values] == words
    assert [duration(s) for s in (5, 65, 7385)] == ["5 s", "1 min 5 s", "2 h 3 min"]


def test_tables() -> None:
    rows = [{"name": "a|b", "score": 0.5}, {"name": "日本", "score": None}]
    assert markdown_table(rows, {"name": "Name", "score": "Score"}).split("\n") == [
        "| Name | Score |",
        "|---|---:|",
        "| a\\|b | 0.5 |",
        "| 日本 |  |",
    ]
    plain = plain_table(rows, ["name", "score"]).split("\n")
    assert plain == ["name  score", "────  ─────", "a|b     0.5", "日本"]
    assert markdown_table([], ["x"]) == "| x |\n|---|"


def test_figures(run: Path) -> None:
    record = read_run(run)
    for name in ("loss.png", "loss.svg"):
        loss_curve(record.steps, run / "figures" / name)
        assert (run / "figures" / name).stat().st_size > 5000
    axes = metric_bars(METRICS).axes[0]
    assert sorted(bar.get_width() for bar in axes.patches) == pytest.approx([30, 40, 50, 80, 90, 100])
    with pytest.raises(UserError, match="no loss"):
        loss_curve([{"step": 1}])
    with pytest.raises(UserError, match="no `accuracy`"):
        metric_bars({"CIDEr": 1.0})


def test_importing_the_report_is_light() -> None:
    code = (
        "import sys, vlm_adapt.report.html, vlm_adapt.report.plots\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'PIL', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
