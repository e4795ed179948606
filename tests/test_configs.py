"""Every configuration in configs/ resolves, and runs with its parts replaced by tiny random ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asking
import pytest
import tiny
import tiny_masks
import tiny_prompts
import yaml

from vlm_adapt.config.load import load_run
from vlm_adapt.models.check import check_run
from vlm_adapt.train.journal import read_journal
from vlm_adapt.train.run import train

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
STEPS = 2
CAMVID = "sky building pole road pavement tree sign-symbol fence car pedestrian bicyclist".split()


@pytest.fixture(scope="module")
def shards(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A shard for each word that a configuration's own paths hold; "" for the others."""
    folder = tmp_path_factory.mktemp("shards")
    captions = [
        (f"c{n}", {"png": tiny.image(n), "json": json.dumps({"captions": ["a red shape", "red"]}).encode()})
        for n in range(12)
    ]
    user = {"role": "user", "content": "<image>\nwhat color is it?"}
    turns = json.dumps({"messages": [user, {"role": "assistant", "content": "red"}]}).encode()
    box = {"label": "circle", "box": [1, 2, 20, 15]}
    everything = {
        **{"caption": "a photo of two cats", "question": "what is it?", "answer": "two cats"},
        **{"objects": [box], "labels": ["circle", "square"], "ocr": [{"text": "no"}], "text": tiny.WORDS},
    }
    tasks = [(f"t{n}", {"png": tiny.image(n), "json": json.dumps(everything).encode()}) for n in range(12)]
    unseen = yaml.safe_load(next(path for path in CONFIGS if path.stem == "lseg_unseen").read_text())
    coco = unseen["data"]["train"][1]["task"]
    return {
        "camvid": tiny_masks.shard(folder / "camvid.tar", 12, CAMVID),
        "coco128": tiny_masks.shard(folder / "coco.tar", 12, ["bus", *coco["leave_out"], *coco["rename"]]),
        "captions": tiny.shard(folder / "captions.tar", captions),
        "pali": tiny.shard(folder / "pali.tar", tasks),
        "llava": tiny.shard(
            folder / "llava.tar", [(f"m{n}", {"png": tiny.image(n), "json": turns}) for n in range(12)]
        ),
        "nlvr-masks": asking.shard(folder / "masks.tar", 12, plain=()),
        "": tiny.questions_shard(folder / "questions.tar", 12, questions=3),
    }


def sources(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of all shards that a configuration names, and their paths."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        place = f"{path}.{key}" if path else str(key)
        short = path.endswith("data") and key in ("train", "evaluate")
        if isinstance(value, str) and (key == "shards" or short):
            yield place, value
        yield from sources(value, place)


def vision_language(model: dict[str, Any], parts: Path) -> list[str]:
    """A tiny tower and language for a model's own; a tiny mask decoder where it has one."""
    language = "t5" if "t5" in model["language"]["model"] else "llama"
    layers = [0, 1] if len(model["vision"].get("layers", [])) > 1 else [-1]
    changes = [
        f"model.vision={{model: {parts / 'vit'}, layers: {layers}}}",
        f"model.language.model={parts / language}",
    ]
    if "masks" in model:
        decoder = {"weights": "random:", **asking.DECODER}
        changes.append(f"model.masks={{vision: {{model: {parts / 'vit'}}}, decoder: {json.dumps(decoder)}}}")
    return changes


def segmenter(model: dict[str, Any], parts: Path) -> list[str]:
    """A tiny tower of four depths and a tiny text encoder."""
    tiny_masks.run_tree(parts)
    return [
        f"model.vision={{model: {parts / 'vit4'}, layers: [0, 1, 2, 3]}}",
        f"model.text.model={parts / 'bert'}",
    ]


def promptable(model: dict[str, Any], parts: Path) -> list[str]:
    """A tiny tower and a small decoder of SAM's kind."""
    small = tiny_prompts.run_tree(parts)["model"]
    return [f"model.{key}={json.dumps(small[key])}" for key in ("vision", "decoder")]


TINY = {"vision_language": vision_language, "segmenter": segmenter, "promptable": promptable}


def tiny_overrides(config: Path, parts: Path, shards: dict[str, Path], output: Path) -> list[str]:
    """What replaces the parts and the data; everything else stays as the configuration has it."""
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    changes = [f"output_dir={output}", "data.workers=0"]
    changes += TINY[tree["model"].get("kind", "vision_language")](tree["model"], parts)
    for place, path in sources(tree):
        word = next(word for word in shards if word in path)
        changes.append(f"{place}={shards[word]}")
    for prefix in [f"stages.{n}." for n in range(len(tree.get("stages", [])))] or [""]:
        changes += [f"{prefix}train.max_steps={STEPS}", f"{prefix}train.per_device_train_batch_size=4"]
    return changes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_resolves(config: Path) -> None:
    run = load_run(config)
    check_run(run, train=False, evaluate=False)
    assert run.output_dir == f"outputs/{config.stem}"  # as README and comments say
    first = config.read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith("# ") and len(first) > 40, "a configuration opens with what it is for"


def test_the_verb_shows_a_run_with_its_defaults() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "vlm_adapt", "config", str(CONFIGS[0]), "seed=7"],
        capture_output=True,
        text=True,
        check=True,
        cwd=CONFIGS[0].parents[1],
    )
    tree = yaml.safe_load(shown.stdout)
    assert tree["seed"] == 7 and tree["train"]["adam_beta2"] == 0.999


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_runs_with_tiny_parts(config: Path, parts: Path, shards: dict[str, Path], tmp_path: Path) -> None:
    if not (parts / "t5").exists():
        tiny.t5(parts / "t5")
    run = load_run(config, tiny_overrides(config, parts, shards, tmp_path / "out"))
    check_run(run)
    assert train(run) == 0
    lines = [line for line in read_journal(tmp_path / "out") if "event" not in line]
    assert len(lines) == STEPS * len(run.stage_runs())
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    scored = bool(run.data.evaluate)
    assert (tmp_path / "out" / "metrics.json").is_file() == scored
