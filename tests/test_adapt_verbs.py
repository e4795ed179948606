"""The verbs `adapt list` and `adapt show`: what each method says of itself, and counts without weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from vlm_adapt.adapt import METHODS
from vlm_adapt.cli import main
from vlm_adapt.models import about
from vlm_adapt.models.about import constants_of, settings_of

ROOT = Path(__file__).parents[1]


def test_every_method_says_what_it_is() -> None:
    for name in METHODS:
        said = constants_of(METHODS[name])
        assert said["name"] == name and said["summary"] and said["sides"], name
        assert set(said["sides"]) <= {"vision", "connector", "language"}
        assert said["paper"] or name in ("full", "last_blocks"), name


def test_each_source_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many methods stand in one file, and their parents in few."""
    read: list[Path] = []
    whole = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: (read.append(path), whole(path, **how))[1])
    about._parsed.cache_clear()
    for name in METHODS:
        settings_of(METHODS[name])
        constants_of(METHODS[name])
    assert len(read) == len(set(read)) and {path.name for path in read} >= {"tuner.py", "method.py"}


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "list", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(METHODS)
    assert rows["lora"]["where"] == ["vision", "connector", "language"] and rows["lora"]["merges"]
    assert {"r", "lora_alpha", "target_modules"} <= set(rows["lora"]["settings"])
    assert main(["adapt", "list"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name} " in "\n" + text for name in METHODS)


def test_list_needs_no_torch() -> None:
    code = "import sys; from vlm_adapt.cli import main; main(['adapt', 'list']); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_page_has_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "list", "--markdown"]) == 0
    page = (ROOT / "docs" / "adaptation.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page


def test_show_counts_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a tower that is only named: its weights are on a hub, and are not asked for."""
    tree = tiny.run_tree(tmp_path)
    tree["model"]["vision"] = {"model": "timm:vit_base_patch16_224"}
    tree["adapt"] += [{"method": "bitfit", "where": "vision"}]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    (tmp_path / "llama" / "model.safetensors").unlink()
    capsys.readouterr()
    assert main(["adapt", "show", str(path), "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)
    lines = {line["label"]: line for line in stage["lines"]}
    assert lines["vision-bitfit"]["count"] == 102_912 - 768 + 768  # BitFit's own figure for ViT-B
    assert lines["language-lora"]["count"] == 4096 and lines["language-lora"]["bytes_stored"] == 4 * 4096
    assert stage["parts"]["language"] == [4096, 39_392 + 4096]
    assert main(["adapt", "show", str(path)]) == 0
    text = capsys.readouterr().out
    assert "language-lora" in text and "2 x 4 x 32" in text and "trains" in text


def test_show_answers_a_mistake_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny.run_tree(tmp_path)
    capsys.readouterr()
    tree["adapt"] += [{"method": "houlsbi", "where": "language"}]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["adapt", "show", str(path)]) == 2
    told = capsys.readouterr().err.strip()
    assert "did you mean 'houlsby'" in told and "\n" not in told
    for blocks, said in (("9", "has no block 9"), ("a:b", "is no choice of blocks"), ([], "empty list")):
        tree["adapt"][-1] = {"method": "houlsby", "where": "language", "bottleneck": 2, "blocks": blocks}
        path.write_text(yaml.safe_dump(tree))
        assert main(["adapt", "show", str(path)]) == 2
        told = capsys.readouterr().err.strip()
        assert said in told and "\n" not in told, told
