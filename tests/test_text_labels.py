"""Labels: means over synonyms and templates by formula, encoded once, gradients; methods on the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_text import bert, clip_folder, dual
from torch.nn.functional import normalize

from vlm_adapt.adapt.plan import apply_plan
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.text import build_text
from vlm_adapt.text.labels import LabelEmbeddings, read_labels, shown

CLOSE = 1e-6  # float32 sums of the same numbers in other batches


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny text encoder of each library."""
    folder = tmp_path_factory.mktemp("texts")
    bert(folder / "bert")
    clip_folder(folder / "open_clip")
    dual(folder / "clip", "clip")
    return {name: folder / name for name in ("bert", "open_clip", "clip")}


def test_mean_over_synonyms_and_templates(folders: dict[str, Path]) -> None:
    encoder = build_text(str(folders["bert"]))
    labels = LabelEmbeddings(encoder, ["{}", "a photo of a {}"])
    found = labels(["car|automobile", "sky"])
    texts = ["car", "a photo of a car", "automobile", "a photo of a automobile"]
    with torch.no_grad():
        mean_D = torch.stack([encoder([text])[0] for text in texts]).mean(0)
        sky_D = torch.stack([encoder([text])[0] for text in ("sky", "a photo of a sky")]).mean(0)
    assert found.shape == (2, labels.width)
    assert (found[0] - mean_D / mean_D.norm()).abs().max() < CLOSE
    assert (found[1] - sky_D / sky_D.norm()).abs().max() < CLOSE
    assert mean_D.norm() < 0.9999  # bringing it to length 1 again is work
    plain = LabelEmbeddings(encoder)(["sky"])
    assert (plain[0] - normalize(encoder(["sky"])[0], dim=0)).abs().max() < CLOSE


def test_each_frozen_name_is_encoded_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_text(str(folders["open_clip"])).requires_grad_(False)
    seen: list[str] = []
    encoder.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
    labels = LabelEmbeddings(encoder, ["{}", "one {}"])
    first = labels(["cat", "dog|hound", "cat"])
    again = labels(["dog|hound", "bird", "cat"])
    assert sorted(seen) == sorted(set(seen)) and labels.encoded == len(seen) == 2 + 4 + 2
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], again[0])
    assert not again.requires_grad
    labels.forget()
    assert (labels(["cat"])[0] - first[0]).abs().max() < CLOSE and labels.encoded == 10
    monkeypatch.setattr("vlm_adapt.text.labels.TEXTS_AT_ONCE", 3)  # labels are not cut apart wrongly
    labels.forget()
    assert (labels(["cat", "dog|hound", "bird"])[1] - first[1]).abs().max() < CLOSE


def test_a_training_encoder_is_never_remembered(folders: dict[str, Path]) -> None:
    encoder = build_text(str(folders["bert"]))
    labels = LabelEmbeddings(encoder)
    calls: list[int] = []
    encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    with torch.no_grad():
        before = labels(["cat", "dog"])
    for _ in range(2):
        vectors = labels(["dog", "cat", "dog"])
        assert vectors.requires_grad and (vectors[1] - before[0]).abs().max() < CLOSE
    assert calls == [2, 2, 2]  # one forward pass a call, of distinct labels
    vectors[:, 0].sum().backward()
    assert all(p.grad is not None for p in encoder.blocks[0].parameters())
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        after = labels(["cat", "dog"])
    assert (after - before).abs().max() > 1e-3


def test_vectors_are_kept_where_they_are_wanted(folders: dict[str, Path]) -> None:
    labels = LabelEmbeddings(build_text(str(folders["bert"])).requires_grad_(False), device="meta")
    assert labels(["cat"]).device.type == "meta"
    labels = LabelEmbeddings(labels.encoder)
    kept = labels(["cat"])
    assert torch.equal(labels.to("cpu")(["cat"]), kept) and labels.encoded == 1


def test_what_is_kept_has_full_precision(folders: dict[str, Path]) -> None:
    encoder = build_text(str(folders["bert"])).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, kept = encoder(["cat"]), LabelEmbeddings(encoder)(["cat"])
    exact = encoder(["cat"])
    assert (rounded - exact).abs().max() > 1e-4  # bfloat16 has 8 bits
    assert (kept - exact).abs().max() < CLOSE


def test_names() -> None:
    assert read_labels(" cat, grass ,other") == ("cat", "grass", "other")
    assert read_labels(["car | automobile", "sky"]) == ("car|automobile", "sky")
    assert shown("car | automobile") == "car"
    assert read_labels("a,b,") == ("a", "b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "list of labels is empty"),
        ([], "list of labels is empty"),
        ("cat,,dog", "a label is empty"),
        (["cat", "car|"], "label 'car|' has an empty synonym"),
        (["cat", "dog", " cat "], "'cat' and ' cat ' are both 'cat' when stripped"),
        (["car|automobile", "car|auto"], "are both 'car'"),
    ],
)
def test_wrong_labels(given: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_labels(given)
    assert words in tiny.sentence(caught)


def test_wrong_templates(folders: dict[str, Path]) -> None:
    encoder = build_text(str(folders["bert"]))
    for templates, words in (([], "list of templates is empty"), (["a photo"], "'a photo' has no {}")):
        with pytest.raises(UserError, match=words):
            LabelEmbeddings(encoder, templates)
    labels = LabelEmbeddings(encoder)
    for wrong in ([], "cat", ["cat", ""], ["cat|"]):
        with pytest.raises(UserError):
            labels(wrong)
    with pytest.raises(UserError, match="reads 40 at most"):
        labels(["cats " * 60])


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 2}),
    ("ia3", {}),
    ("bitfit", {}),
    ("norm_tuning", {}),
    ("houlsby", {"bottleneck": 4}),
    ("full", {}),
    ("last_blocks", {}),
]


@pytest.mark.parametrize("library", ["bert", "open_clip", "clip"])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_methods_attach_and_train(
    folders: dict[str, Path], library: str, method: str, options: dict[str, Any]
) -> None:
    encoder = build_text(str(folders[library]))
    with torch.no_grad():
        before = encoder(["a red circle"])
    line = Adapt(method=method, where="language", **options)
    unused = {"language": set(encoder.unused_modules())}
    plan = apply_plan({"language": encoder}, [[line]], unused)
    assert (encoder(["a red circle"]) - before).abs().max() < CLOSE
    vectors = LabelEmbeddings(encoder)(["a red circle", "cats"])
    (vectors @ torch.randn(vectors.shape[1])).sum().backward()
    parameters = plan.attached[0].method.parameters
    assert parameters and all(parameter.grad is not None for parameter in parameters.values())
    assert any(parameter.grad.abs().sum() > 0 for parameter in parameters.values())


@pytest.mark.parametrize(
    "method", ["prompt_tuning", "p_tuning", "prefix_tuning", "side_tuning", "visual_prompt"]
)
def test_methods_that_do_not_fit(folders: dict[str, Path], method: str) -> None:
    for library in ("bert", "open_clip"):
        encoder = build_text(str(folders[library]))
        with pytest.raises(UserError, match="choose another method|is for vision") as caught:
            apply_plan({"language": encoder}, [[Adapt(method=method, where="language")]])
        tiny.sentence(caught)


def test_blocks_can_be_chosen_replaced_and_recomputed(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        encoder = build_text(str(folder))
        apply_plan({"language": encoder}, [[Adapt(method="full", where="language", blocks=[1])]])
        trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
        assert trained and all(name.startswith(encoder.block_names[1]) for name in trained)
        before = encoder(["cats"])
        encoder.set_activation_checkpointing(True)
        assert (
            encoder.train()(["cats"]) - before
        ).abs().max() < CLOSE or folder.name == "bert"  # it drops out
        encoder.eval()
        old = encoder.blocks[0]
        encoder.set_block(0, torch.nn.Sequential())
        assert encoder.blocks[0] is not old
