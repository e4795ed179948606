"""The marks of a base: the same for the same weights, another for others, and refused with both names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from small_adapters import full, lora, trained

from vlm_adapt.cli import main
from vlm_adapt.config.schema import Adapt, Model
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import build
from vlm_adapt.models.fingerprint import check_base, fingerprint
from vlm_adapt.models.restore import restore


def model(parts: Path, **changes: Any) -> Model:
    tree = tiny.run_tree(parts)["model"]
    for key, value in changes.items():
        part, _, name = key.partition("__")
        tree[part][name] = value
    return Model.model_validate(tree)


def marks(parts: Path, **changes: Any) -> dict[str, dict[str, str]]:
    made = build(model(parts, **changes), torch.float32).base
    assert made is not None
    return made


@pytest.fixture(scope="module")
def copies(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`same`: the language under another name. `other`: other weights. `eps`: another norm's epsilon."""
    folder = tmp_path_factory.mktemp("copies")
    shutil.copytree(parts / "llama", folder / "same")
    shutil.copytree(parts / "llama", folder / "eps")
    config = json.loads((folder / "eps" / "config.json").read_text())
    (folder / "eps" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(parts / "llama", folder / "other")
    kind = LlamaConfig.from_pretrained(folder / "other")
    tiny.seeded(LlamaForCausalLM, kind, seed=5).save_pretrained(folder / "other")
    return folder


def test_the_same_weights_agree(parts: Path, copies: Path) -> None:
    """In bf16, under another name, and whatever a connector's seed: a base is what it computes."""
    first = marks(parts)
    half = build(model(parts), torch.bfloat16).base
    assert half == first
    renamed = marks(parts, language__model=str(copies / "same"))
    assert renamed["language"].pop("name") != first["language"]["name"]
    assert renamed["language"] == {key: first["language"][key] for key in ("config", "weights")}
    assert set(map(len, renamed["language"].values())) == {32}


def test_other_weights_and_other_settings_differ(parts: Path, copies: Path) -> None:
    first = marks(parts)["language"]
    other = marks(parts, language__model=str(copies / "other"))["language"]
    assert other["config"] == first["config"] and other["weights"] != first["weights"]
    eps = marks(parts, language__model=str(copies / "eps"))["language"]
    assert eps["config"] != first["config"] and eps["weights"] == first["weights"]
    connector = marks(parts, connector__name="linear")["connector"]
    assert connector["config"] != marks(parts)["connector"]["config"]


def test_one_value_of_a_norm_is_seen(parts: Path) -> None:
    made = build(model(parts), torch.float32)
    with torch.no_grad():
        made.model.language.model.model.norm.weight[3] += 0.5
    after = fingerprint(made.model, made.config)
    assert made.base is not None and after["language"]["weights"] != made.base["language"]["weights"]
    assert after["vision"] == made.base["vision"]


def test_position_tables_are_no_mark(parts: Path) -> None:
    """They are interpolated to the image's size, which need not round alike everywhere."""
    made = build(model(parts), torch.float32)
    table: Any = next(p for n, p in made.model.vision.named_parameters() if "position_embed" in n)
    with torch.no_grad():
        table += 1.0
    assert fingerprint(made.model, made.config) == made.base


def test_taken_before_anything_is_attached(parts: Path) -> None:
    """PiSSA takes its first product out of the base's weights; the mark is of those before."""
    made = build(model(parts), torch.float32)
    before = made.base
    made.adapt([[Adapt.model_validate(lora(init_lora_weights="pissa"))]])
    assert made.base == before == marks(parts)
    assert fingerprint(made.model, made.config) != before


def test_no_values_and_no_seed_give_no_mark(parts: Path) -> None:
    empty = build(model(parts), torch.float32, empty=True).base
    assert empty is not None and {part["weights"] for part in empty.values()} == {""}
    assert empty["language"]["config"] == marks(parts)["language"]["config"]
    # Two towers drawn without a seed share nothing: that they differ tells nobody anything.
    drawn = marks(parts, vision__weights="random:")["vision"]
    assert drawn["weights"] == "" and drawn["name"].endswith("vit (random:)")
    check_base(marks(parts), empty, "'x'")


def test_a_connector_trained_in_full_may_have_had_any_start(parts: Path) -> None:
    first, other = (
        build(model(parts), torch.float32, seed=0).base,
        build(model(parts), torch.float32, seed=1).base,
    )
    check_base(first, other, "'x'", ["connector-full"])
    with pytest.raises(UserError, match="on a connector .mlp. that was drawn with another seed"):
        check_base(first, other, "'x'", ["connector-lora"])


def test_another_base_is_refused_with_both_names(
    parts: Path, copies: Path, tmp_path: Path, capsys: Any
) -> None:
    checkpoint = trained(parts, tmp_path / "run", adapt=[lora(), full()])
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["base"] == marks(parts)
    text = (checkpoint / "run.yaml").read_text()
    for name, word in (("other", "other weights"), ("eps", "another architecture")):
        (checkpoint / "run.yaml").write_text(text.replace(str(parts / "llama"), str(copies / name)))
        with pytest.raises(
            UserError, match=f"language '{parts}/llama', and this is '{copies}/{name}'.*{word}"
        ):
            restore(checkpoint)
    assert main(["chat", str(checkpoint), "--prompt", "hi"]) == 2
    said = capsys.readouterr().err
    assert said.count("vlm-adapt: ") == 1 and "Traceback" not in said and "another architecture" in said
    (checkpoint / "run.yaml").write_text(text.replace(str(parts / "llama"), str(copies / "same")))
    restore(checkpoint)  # the same weights elsewhere


def test_under_zero3(parts: Path, tmp_path: Path) -> None:
    """Weights are shared out after they were marked; and PiSSA has taken from them by then."""
    changes = {"adapt": [lora(init_lora_weights="pissa"), full()], "train__deepspeed": "zero3"}
    checkpoint = trained(parts, tmp_path / "run", train__max_steps=1, **changes)
    assert json.loads((checkpoint / "state.json").read_text())["base"] == marks(parts)
    restore(checkpoint)


def test_files_that_changed_under_their_name(parts: Path, copies: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "llama", tmp_path / "llama")
    language = {"model": str(tmp_path / "llama")}
    checkpoint = trained(parts, tmp_path / "run", model__language=language)
    shutil.copyfile(copies / "other" / "model.safetensors", tmp_path / "llama" / "model.safetensors")
    with pytest.raises(UserError, match="of the same name, whose files have changed: it has other weights"):
        restore(checkpoint)


def test_checkpoints_of_before_are_read(parts: Path, tmp_path: Path) -> None:
    checkpoint = trained(parts, tmp_path / "run")
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key not in ("base", "plan")}))
    restore(checkpoint)
