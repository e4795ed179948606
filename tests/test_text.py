"""Text encoders: equal to their libraries' own output, bad names, long texts, and shapes without values."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.functional import normalize

from vlm_adapt import weights
from vlm_adapt.errors import UserError
from vlm_adapt.text import build_text

TEXTS = ["a red circle", "cats", "what is the shape of two green cats"]
# float32 sums of the same numbers, in another batch shape; vectors have length 1
CLOSE = 1e-6
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 330,
    "bos_token_id": 3,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def bert(folder: Path, **more: Any) -> Any:
    """A random BERT with a tokenizer, saved with a pooler as sentence encoders are."""
    config = transformers.BertConfig(**{**SMALL, "max_position_embeddings": 40, **more})
    model = tiny.seeded(transformers.BertModel, config)
    model.save_pretrained(folder)
    tiny.tokenizer(folder, bos=True)
    return model


def dual(folder: Path, family: str) -> tuple[Any, Any]:
    """A random CLIP or SigLIP with a tokenizer."""
    text = {**SMALL, "max_position_embeddings": 24, "eos_token_id": 2}
    vision = {**text, "image_size": 16, "patch_size": 8}
    if family == "clip":
        config: Any = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = tiny.seeded(transformers.CLIPModel, config)
    else:
        text["projection_size"] = 24
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = tiny.seeded(transformers.SiglipModel, config)
        for parameter in model.text_model.parameters():
            torch.nn.init.normal_(
                parameter, std=0.2
            )  # its own initialisation is too even to tell texts apart
    model.save_pretrained(folder)
    return model, tiny.tokenizer(folder, bos=True)


def clip_folder(folder: Path, **text: Any) -> Any:
    """A tiny model in open_clip's format, with random weights."""
    cfg = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2, **text},
    }
    folder.mkdir()
    config = {"model_cfg": cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for name, parameter in model.named_parameters():
        if "transformer" not in name or parameter.ndim == 1:
            torch.nn.init.normal_(
                parameter, std=0.3
            )  # bare random text towers say nearly the same of all texts
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model.eval()


def test_open_clip_equals_encode_text(tmp_path: Path) -> None:
    model = clip_folder(tmp_path / "clip")
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")(TEXTS)
    with torch.no_grad():
        theirs = model.encode_text(ids, normalize=True)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-3
    state = model.state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    text_only = {k: v for k, v in state.items() if not k.startswith(("visual.", "logit"))}
    save_file(text_only, tmp_path / "text.safetensors")
    for source in ("hub:", f"file:{tmp_path / 'whole.safetensors'}", f"file:{tmp_path / 'text.safetensors'}"):
        encoder = build_text(str(tmp_path / "clip"), source)
        with torch.no_grad():
            ours = encoder(TEXTS)
        assert ours.dtype == torch.float32 and ours.shape == (3, encoder.width) == (3, 24)
        assert (ours - theirs).abs().max() < CLOSE
    twin = copy.deepcopy(encoder)
    assert twin.model.get_input_embeddings() is twin.model.token_embedding
    del text_only["ln_final.bias"]
    save_file(text_only, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="1 missing .ln_final.bias") as caught:
        build_text(str(tmp_path / "clip"), "hub:", local_weights=tmp_path / "cut.safetensors")
    tiny.sentence(caught)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_equals_get_text_features(tmp_path: Path, family: str) -> None:
    model, tokenizer = dual(tmp_path, family)
    encoder = build_text(str(tmp_path))
    length = {"padding": "max_length", "max_length": 24} if family == "siglip" else {"padding": True}
    batch = tokenizer(TEXTS, return_tensors="pt", **length)
    with torch.no_grad():
        mask = {} if family == "siglip" else {"attention_mask": batch["attention_mask"]}
        theirs = normalize(model.get_text_features(batch["input_ids"], **mask).pooler_output, dim=-1)
        ours = encoder(TEXTS)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-3
    assert encoder.width == 24 and (ours - theirs).abs().max() < CLOSE
    with torch.no_grad():  # alone as among others
        assert (encoder(TEXTS[1:2]) - ours[1:2]).abs().max() < CLOSE
    assert not any("vision" in name for name, _ in encoder.named_parameters())


def test_text_side_alone_of_clip_has_no_projection(tmp_path: Path) -> None:
    model, tokenizer = dual(tmp_path / "whole", "clip")
    transformers.CLIPTextModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "alone")
    tokenizer.save_pretrained(tmp_path / "alone")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = normalize(model.text_model(**batch).pooler_output, dim=-1)
        encoder = build_text(str(tmp_path / "alone"))
        assert encoder.width == 32 and (encoder(TEXTS) - theirs).abs().max() < CLOSE


def by_formula(hidden_NTD: torch.Tensor, mask_NT: torch.Tensor, pooling: str) -> torch.Tensor:
    """Sentence vectors as sentence-transformers defines them, text by text."""
    rows = []
    for hidden_TD, mask_T in zip(hidden_NTD, mask_NT.bool(), strict=True):
        kept = hidden_TD[mask_T]
        rows.append({"mean": kept.mean(0), "cls": kept[0], "last": kept[-1]}[pooling])
    return normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("pooling", [None, "mean", "cls", "last"])
def test_sentence_encoders(tmp_path: Path, pooling: str | None) -> None:
    model = bert(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        theirs = by_formula(hidden, batch["attention_mask"], pooling or "mean")
        encoder = build_text(str(tmp_path), options={"pooling": pooling} if pooling else None)
        assert (encoder(TEXTS) - theirs).abs().max() < CLOSE
    assert not any("pooler" in name for name, _ in encoder.named_parameters())
    assert encoder.block_names == ["model.encoder.layer.0", "model.encoder.layer.1"]


def test_a_folder_says_how_it_pools(tmp_path: Path) -> None:
    bert(tmp_path)
    mean = build_text(str(tmp_path))(TEXTS)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    modules = '[{"type": "sentence_transformers.models.Dense"}]'
    (tmp_path / "modules.json").write_text(modules)
    encoder = build_text(str(tmp_path))
    cls = build_text(str(tmp_path), options={"pooling": "cls"})(TEXTS)
    assert torch.equal(encoder(TEXTS), cls) and not torch.allclose(cls, mean, atol=0.01)
    assert "dense layers" in encoder.notes[0]


def test_t5_encoder_and_mpnet(tmp_path: Path) -> None:
    tiny.t5(tmp_path / "t5")
    encoder = build_text(str(tmp_path / "t5"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "t5")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").encoder.eval()
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        assert (encoder(TEXTS) - by_formula(hidden, batch["attention_mask"], "mean")).abs().max() < CLOSE
    assert not any("decoder" in name for name, _ in encoder.named_parameters())
    config = transformers.MPNetConfig(**{**SMALL, "pad_token_id": 1}, max_position_embeddings=42)
    tiny.seeded(transformers.MPNetModel, config).save_pretrained(tmp_path / "mpnet")
    tiny.tokenizer(tmp_path / "mpnet", chat=False)
    mpnet = build_text(str(tmp_path / "mpnet"))
    assert mpnet.limit == 40  # positions are counted from padding_idx + 1
    assert mpnet([" cats" * 40]).shape == (1, 32)


def test_end_token(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path, chat=False, bos=True)
    bert(tmp_path)
    with pytest.raises(UserError, match="puts no end token after 'a red circle'"):
        build_text(str(tmp_path), options={"pooling": "eos"})(TEXTS)
    encoder: Any = build_text(str(tmp_path), options={"pooling": "eos"})
    end = tokenizer.eos_token or "</s>"
    encoder.tokenizer.eos_token = end
    last = build_text(str(tmp_path), options={"pooling": "last"})
    ended = [f"{text}{end}" for text in TEXTS]
    assert torch.equal(encoder(ended), last(ended))


def test_shapes_without_values(tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip")
    bert(tmp_path / "bert")
    for folder in ("clip", "bert"):
        with torch.device("meta"):
            encoder = build_text(str(tmp_path / folder), "random:")
        assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
    first, second, other = (build_text(str(tmp_path / "bert"), f"random:{seed}")(TEXTS) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_texts_that_do_not_fit(tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip")
    bert(tmp_path / "bert")
    for folder, limit in (("clip", 77), ("bert", 40)):
        encoder = build_text(str(tmp_path / folder))
        ends = 2 if folder == "clip" else 1
        fits = " cats" * (limit - ends)
        assert encoder.token_counts([fits, " cats"]) == [limit, ends + 1]
        encoder([fits])
        with pytest.raises(
            UserError, match=f"has {limit + 1} tokens .* reads {limit} at most, and so"
        ) as caught:
            encoder([fits, f"{fits} cats", f"{fits} red"])
        tiny.sentence(caught)
        for wrong in ([], "cats", ["cats", " "]):
            with pytest.raises(UserError):
                encoder(wrong)


def test_wrong_names(tmp_path: Path) -> None:
    tiny.vit(tmp_path / "vit")
    tiny.tokenizer(tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    bert(tmp_path / "bert")
    (tmp_path / "pickled").mkdir()
    for model, source, options, words in [
        ("openclip:ViT-B-32", "hub:", {}, "did you mean 'open_clip'"),
        ("nothing", "hub:", {}, "unknown text encoder 'nothing'"),
        ("open_clip:ViT-B-33", "hub:", {}, "did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32", "hub:opnai", {}, "did you mean 'openai'"),
        (str(tmp_path / "empty"), "hub:", {}, "no config.json"),
        (str(tmp_path / "vit"), "hub:", {}, "reads no text"),
        (str(tmp_path / "bert"), "zoo:", {}, "unknown weight source"),
        (str(tmp_path / "bert"), "file:/nowhere", {}, "does not exist"),
        (str(tmp_path / "bert"), "random:x", {}, "whole number"),
        (str(tmp_path / "bert"), "hub:", {"pooling": "max"}, "mean, cls, eos, last"),
        (str(tmp_path / "bert"), "hub:", {"poling": "mean"}, "did you mean 'pooling'"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            build_text(model, source, options=options)
        tiny.sentence(caught)
    other = transformers.BertModel(
        transformers.BertConfig(**{**SMALL, "intermediate_size": 48, "max_position_embeddings": 40})
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="do not fit the text encoder: 6 of another shape") as caught:
        build_text(str(tmp_path / "bert"), f"file:{tmp_path / 'other'}")
    tiny.sentence(caught)


@pytest.mark.network
def test_minilm_knows_that_automobiles_are_cars() -> None:
    folder = weights.fetch("all-minilm-l6-v2")
    encoder = build_text(str(folder))
    assert encoder.width == 384 and sum(p.numel() for p in encoder.parameters()) == 22_565_376
    with torch.no_grad():
        car, automobile, sky = encoder(["car", "automobile", "sky"])
    assert car @ automobile > 0.8 > 0.5 > car @ sky
