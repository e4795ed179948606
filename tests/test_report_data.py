"""The report's section on data: useful positions, shares of sources, the account, refusals by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import Page

from vlm_adapt.report.account import told
from vlm_adapt.report.charts import share_chart
from vlm_adapt.report.data import OTHERS, source_charts
from vlm_adapt.report.html import write_report
from vlm_adapt.report.read import RunRecord, read_run

SOURCES = {
    "captions": {"read": 60, "used": 55, "refused": 5, "tokens": 600},
    "boxes <b>": {"read": 30, "used": 29, "refused": 1, "tokens": 1400},
}
REFUSED = [
    (1, "captions", "000042", "damaged JPEG image: Premature end of JPEG file"),
    (2, "captions", "000042", "damaged JPEG image: Premature end of JPEG file"),
    (2, "captions", "000099", "damaged JPEG image: Premature end of JPEG file"),
    (2, "boxes <b>", "000007", "damaged JPEG image: no SOI"),
    (3, "captions", "<script>alert(1)</script>", "3 tokens do not fit into 2"),
    (4, "captions", "000011", "4 tokens do not fit into 2"),
]


def steps(count: int = 10, **more: Any) -> list[dict[str, Any]]:
    return [{"step": n, "stage": "train", "loss": 1.0} | more for n in range(1, count + 1)]


def shares(**by_name: float) -> dict[str, Any]:
    return {
        name: {"samples": 1, "learned_tokens": 1, "share_of_samples": part, "share_of_tokens": 1 - part}
        for name, part in by_name.items()
    }


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    account = {
        "read": 90,
        "used": 84,
        "truncated": 2,
        "split": 3,
        "refused": {"damaged JPEG image": 4, "N tokens do not fit into N": 2},
        "examples": {},
        "sources": SOURCES,
    }
    parts = shares(captions=0.6) | shares(**{"boxes <b>": 0.4})
    lines = [*steps(useful_tokens=0.75, sources=parts), {"event": "finish", "step": 10, "account": account}]
    write(tmp_path / "journal.jsonl", lines)
    fields = ("step", "source", "key", "reason")
    write(tmp_path / "refused.jsonl", [dict(zip(fields, one, strict=True)) for one in REFUSED])
    train = [{"name": "captions", "shards": "a", "weight": 3}, {"name": "boxes <b>", "shards": "b"}]
    config = {"data": {"batching": "packed", "mixing": "weight", "train": train}}
    (tmp_path / "run.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def rows(text: str) -> list[list[str]]:
    """The cells of every line of tables in the section on data, without tags."""
    section = text[text.index('<section id="data">') :].partition("</section>")[0]
    found = re.findall(r"<tr.*?>(.*?)</tr>", section)
    return [
        [re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)]
        for row in found
    ]


def test_the_account_by_source(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    table = rows(text)[:4]
    assert table[0][1:] == [
        "read", "used", "refused", "learned tokens", "wanted share", "share of samples", "of learned tokens"
    ]  # fmt: skip
    assert table[1] == ["captions", "60", "55", "5  8.3 %", "600", "75.0 %", "65.5 %", "30.0 %"]
    assert table[2][0] == "boxes &lt;b&gt;" and table[2][-1] == "70.0 %"
    assert table[3] == ["all", "90", "84", "6  6.7 %", "2,000", "", "100.0 %", "100.0 %"]
    lead = "90 samples were read, 84 used, 2 of them truncated, 3 split over several rows, 6 refused."
    assert lead in text and "Useful positions, packed: 75.0 %" in text
    assert Page(run / "report.html").open == [] and "<script>alert" not in text


def test_refusals_by_reason_with_their_first_keys(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    image, tokens = rows(text)[5:7]
    assert image[:4] == ["damaged JPEG image", "4", "3", "captions, boxes &lt;b&gt;"]
    assert "000042 (Premature end of JPEG file)" in image[4] and image[4].count("000042") == 1
    assert "000007 (no SOI)" in image[4]
    assert tokens[:3] == ["N tokens do not fit into N", "2", "2"]
    assert "000011 (4 tokens do not fit into 2)" in tokens[4]
    assert 'href="refused.jsonl"' in text
    elsewhere = write_report(run, run / "a b" / "page.html").read_text(encoding="utf-8")
    assert 'href="../refused.jsonl"' in elsewhere


def test_a_run_that_was_stopped_tells_what_its_checkpoint_knows(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    account = lines[-1]["account"] | {"refused": {"damaged JPEG image": 3}, "read": 40, "used": 37}
    write(run / "journal.jsonl", lines[:-1])
    (run / "checkpoint-2").mkdir()
    (run / "checkpoint-2" / "state.json").write_text(json.dumps({"step": 2, "account": account}))
    (run / "latest").write_text("checkpoint-2\n")
    found = told(read_run(run))
    assert found is not None and (found.until, found.read, found.refused) == (2, 40, 3)
    assert [(one.reason, one.count) for one in found.reasons] == [("damaged JPEG image", 4)]
    record = read_run(run)
    told(record)
    assert "refused.jsonl names 4 of 3 refused samples." in record.notes
    text = write_report(run).read_text(encoding="utf-8")
    assert "Up to the checkpoint of step 2: 40 samples were read" in text
    (run / "latest").write_text("../checkpoint-9")
    without = told(read_run(run))
    assert without is not None and without.read == 0 and without.refused == 6 and len(without.reasons) == 2


def test_a_resumed_run_is_not_told_from_its_earlier_end(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    write(run / "journal.jsonl", [*lines, {"event": "resume", "step": 10}, *steps(2)])
    found = told(read_run(run))
    assert found is not None and found.read == 0


def test_old_journals_have_no_such_section(run: Path) -> None:
    (run / "refused.jsonl").unlink()
    write(run / "journal.jsonl", steps())
    assert 'id="data"' not in write_report(run).read_text(encoding="utf-8")
    old = {
        "read": 12,
        "used": 10,
        "truncated": 0,
        "refused": {"empty": 2},
        "examples": {"empty": ["k1", "k2"]},
    }
    write(run / "journal.jsonl", [*steps(), {"event": "finish", "step": 10, "account": old}])
    text = write_report(run).read_text(encoding="utf-8")
    assert "12 samples were read, 10 used, 2 refused" in text and "refused.jsonl" not in text
    assert rows(text)[1][:3] == ["empty", "2", ""] and "k1" in rows(text)[1][4]
    write(run / "journal.jsonl", [*steps(), {"event": "finish", "account": {"sources": [], "refused": 3}}])
    assert "none refused" not in write_report(run).read_text(encoding="utf-8")


def test_broken_lines_of_refusals_are_said(run: Path) -> None:
    with (run / "refused.jsonl").open("a") as file:
        file.write('[1]\n{"step": 3}\n{"st')
    text = write_report(run).read_text(encoding="utf-8")
    assert "3 unreadable line(s) of refused.jsonl are left out." in text


def test_what_was_mended_and_what_scores_left(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    lines[-1]["account"]["mended"] = {"a request was repeated": 3}
    kept = {"by": "el2n", "samples": 1000, "kept": 750}
    write(run / "journal.jsonl", [{"event": "stage", "selections": {"captions": kept}}, *lines])
    text = write_report(run).read_text(encoding="utf-8")
    assert "Mended on the way, at the cost of no sample: 3 x a request was repeated." in text
    assert "captions: 750 of 1,000 samples were kept by el2n." in text


def test_rows_without_padding_need_no_curve(run: Path) -> None:
    write(run / "journal.jsonl", steps(useful_tokens=1.0))
    assert "Useful positions" not in write_report(run).read_text(encoding="utf-8")


def test_shares_are_bands_that_reach_the_top() -> None:
    chart = share_chart("x", ["a", "b"], [(1.0, [0.25, 0.75]), (5.0, [0.5, 0.5])])
    low, high = sorted(re.findall(r'class="band c\d" d="M0 1000L([^Z]*)L', chart), reverse=True)
    assert low == "0.0 750.0L1000.0 500.0" and high == "0.0 0.0L1000.0 0.0"
    assert share_chart("x", ["a"], []) == ""
    assert 'class="band' in share_chart("x", ["a"], [(3.0, [1.0])])
    many = share_chart("x", ["a"], [(float(n), [1.0]) for n in range(5000)])
    assert len(many) < 40_000 and "[4999.0, 1.0, 0.0" in many.replace("&quot;", '"')


def test_small_sources_share_a_band(tmp_path: Path) -> None:
    parts = {f"s{n}": 0.02 if n < 3 else 0.94 / 7 for n in range(10)}
    record = RunRecord(tmp_path, steps=[{"step": n, "sources": shares(**parts)} for n in (1, 2)])
    chart = source_charts(record)
    assert OTHERS in chart and ">s0<" not in chart and ">s9<" in chart
    assert chart.count("6.0 %") == 2  # of samples, at both steps: three times 2 %
