"""The README's commands do what it says: each is run, on tiny parts where it names large ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import yaml

from vlm_adapt.cli import main
from vlm_adapt.config.load import validate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_two_commands_come_first_and_their_scripts_are_sound() -> None:
    assert [" ".join(words) for words in commands()[:2]] == [
        "bash scripts/quickstart.sh",
        "bash scripts/test.sh",
    ]
    for script in (ROOT / "scripts").glob("*.s*"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"(?:configs|scripts|docs)/[\w./-]+\w", README))
    assert named, "the README names no files at all?"
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing


def test_the_example_configuration_is_a_run() -> None:
    (example,) = blocks("yaml")
    run = validate(yaml.safe_load(example) | {"output_dir": "x"}, "README")
    assert [line.method for line in run.adapt] == ["full", "lora", "lora"]


def test_your_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The block under `Your own run`, line by line, in an empty folder with somebody's photographs."""
    lines = [words for words in commands() if words[0] == "vlm-adapt"][:4]
    assert [words[1] for words in lines] == ["shards", "train", "evaluate", "chat"]
    monkeypatch.chdir(tmp_path)
    parts = tmp_path / "parts"
    tiny.run_tree(parts)
    shutil.copytree(ROOT / "configs", "configs")
    Path("images").mkdir()
    for number in range(6):
        Path(f"images/{number}.jpg").write_bytes(tiny.image(number, kind="JPEG"))
    turns = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}]
    entries = [{"id": str(n), "image": f"{n}.jpg", "conversations": turns} for n in range(6)]
    Path("conversations.json").write_text(json.dumps(entries))
    shutil.copy("images/0.jpg", "photo.jpg")
    smaller = [
        f"model.vision={{model: {parts / 'vit'}}}",
        f"model.language={{model: {parts / 'llama'}}}",
        "model.connector={name: mlp, normalise: data}",
        "train.max_steps=2",
        "train.bf16=false",
    ]
    shards, train, evaluate, chat = lines
    assert main(shards[1:]) == 0
    shutil.copytree("data/llava/mine", "data/llava/held_out")
    assert main([*train[1:], *smaller]) == 0
    assert main([*evaluate[1:]]) == 0
    capsys.readouterr()
    assert main([*chat[1:], "--prompt", "What color?", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 1
    assert main(["report", "outputs/llava_mini"]) == 0
    assert Path("outputs/llava_mini/report.html").is_file()
    adapted = [words for words in commands() if words[:2] == ["vlm-adapt", "adapt"] or "--adapter" in words]
    assert [words[2] for words in adapted[:4]] == ["list", "show", "save", "merge"]
    for words in adapted:
        capsys.readouterr()
        more = smaller[:2] if words[2] == "show" else []
        more = ["--prompt", "What color?", "--max-new-tokens", "3"] if words[1] == "chat" else more
        assert main([*words[1:], *more]) == 0, words
    assert Path("models/merged/receipt.json").is_file() and Path("adapters/mine").is_dir()
