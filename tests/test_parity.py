"""Our assembly gives the library's own logits and losses on the same weights, in float32.

1e-5 is the house's promise; logits here are of the size of 1 to 10, where float32 rounds at 1e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rows
import tiny
import tiny_languages
import torch
import transformers
from torch import Tensor

from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage
from vlm_adapt.language.language import LanguageInput
from vlm_adapt.language.load import load_language
from vlm_adapt.models.masks import attention_mask

torch.set_num_threads(1)
NEAR = {"atol": 1e-5, "rtol": 0.0}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
TURNS = [  # several images, none, two turns: lengths differ, so that rows are padded
    ["<image>\nwhat color is the shape?", "red"],
    ["<image>two<image> cats <image>", "yes", "what is a circle?", "no no"],
    ["is the square blue?", "a photo of two cats"],
]


def text_config(kind: Any, tokenizer: Any, **more: Any) -> Any:
    """A small language configuration with one word more than the tokenizer, which stands for images."""
    return kind(
        vocab_size=len(tokenizer) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )


def save_parts(whole: Any, language: Any, folder: Path) -> None:
    """The tower and the language model of a library's vision-language model, each in a folder."""
    whole.model.vision_tower.save_pretrained(folder / "vision")
    language.model.load_state_dict(whole.model.language_model.state_dict())
    language.lm_head.load_state_dict(whole.lm_head.state_dict())
    language.save_pretrained(folder / "language")


def compare(ours: Any, whole: Any, batch: Any, **more: Tensor) -> None:
    """Logits at every token and the mean loss."""
    ids_BT = batch.ids_BT.clone()
    ids_BT.view(-1)[batch.image_positions_K.flatten()] = whole.config.image_token_id
    valid_BT = batch.documents_BT > 0
    with torch.no_grad():
        theirs = whole(
            input_ids=ids_BT,
            attention_mask=valid_BT.long(),
            pixel_values=ours.model.vision.normalise(batch.pixels_ICHW),
            labels=rows.labels(batch),
            **more,
        )
        total, losses_N = ours.model(batch)
    logits_BTV = ours.model.logits(batch)
    assert valid_BT.sum() < valid_BT.numel()  # there is padding
    torch.testing.assert_close(logits_BTV[valid_BT], theirs.logits[valid_BT], **NEAR)
    torch.testing.assert_close(total / len(losses_N), theirs.loss, **NEAR)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_llava(tmp_path: Path, masked: bool) -> None:
    """CLIP's layer -2, the MLP and Llama: transformers' Llava."""
    tokenizer = tiny.tokenizer(tmp_path / "language")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=text_config(transformers.LlamaConfig, tokenizer),
        image_token_index=len(tokenizer),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    config._attn_implementation = "eager"
    whole = tiny.seeded(transformers.LlavaForConditionalGeneration, config)
    save_parts(whole, transformers.LlamaForCausalLM(config.text_config), tmp_path)
    ours = rows.assemble(tmp_path / "vision", tmp_path / "language", layers=[-2])
    ours.model.connector.load_state_dict(whole.model.multi_modal_projector.state_dict())
    batch = rows.batch(ours, [rows.conversation(ours, *turns, seed=i) for i, turns in enumerate(TURNS)])
    assert batch.plain and len(batch.pixels_ICHW) == 4
    if masked:
        batch.plain = False
    compare(ours, whole, batch)


def test_paligemma(tmp_path: Path) -> None:
    """SigLIP, a linear connector and Gemma, the prompt read both ways: transformers' PaliGemma."""
    tokenizer = tiny.tokenizer(tmp_path / "language", chat=False)
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, projection_dim=32, vision_use_head=False),
        text_config=text_config(transformers.GemmaConfig, tokenizer, head_dim=8),
        image_token_index=len(tokenizer),
        projection_dim=32,
        hidden_size=32,
    )
    config._attn_implementation = "eager"
    whole = tiny.seeded(transformers.PaliGemmaForConditionalGeneration, config)
    save_parts(whole, transformers.GemmaForCausalLM(config.text_config), tmp_path)
    ours = rows.assemble(tmp_path / "vision", tmp_path / "language", "linear", prefix_lm=True)
    ours.model.connector.load_state_dict(whole.model.multi_modal_projector.state_dict())
    single = [["<image>red", "blue"], ["<image><image>\nwhat color is the shape?", "a photo"], ["no", "yes"]]
    batch = rows.batch(ours, [rows.conversation(ours, *turns, seed=i) for i, turns in enumerate(single)])
    assert not batch.plain
    answer_BT = (rows.labels(batch) != -100).long()
    compare(ours, whole, batch, token_type_ids=answer_BT)


SEQ2SEQ = {
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration, {}),
    "t5_untied": (
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    ),
    "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration, {}),
    "umt5": (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration, {}),
}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder(tmp_path: Path, name: str) -> None:
    """Embeddings with images in place, handed to T5: its own logits and loss."""
    tokenizer = tiny.tokenizer(tmp_path / "language", chat=False)
    settings, kind, more = SEQ2SEQ[name]
    config = settings(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        decoder_start_token_id=0,
        **more,
    )
    config._attn_implementation = "eager"
    whole = tiny.seeded(kind, config)
    whole.save_pretrained(tmp_path / "language")
    ours = rows.assemble(tiny.vit(tmp_path / "vision"), tmp_path / "language", layers=[-2])
    single = [TURNS[0], ["<image><image> two", "a photo of two cats"], TURNS[2]]
    batch = rows.batch(ours, [rows.conversation(ours, *turns, seed=i) for i, turns in enumerate(single)])
    labels_BU = torch.full_like(batch.decoder_ids_BU, -100)
    labels_BU.view(-1)[batch.predict_from_N] = batch.targets_N
    inputs = ours.model.inputs(batch)
    with torch.no_grad():
        theirs = whole(
            inputs_embeds=inputs.embeds_BTD, attention_mask=inputs.valid_BT.long(), labels=labels_BU
        )
        total, losses_N = ours.model(batch)
    learned_BU = labels_BU != -100
    assert not learned_BU.all() and not inputs.valid_BT.all()
    torch.testing.assert_close(ours.model.logits(batch)[learned_BU], theirs.logits[learned_BU], **NEAR)
    torch.testing.assert_close(total / len(losses_N), theirs.loss, **NEAR)
    assert len(ours.model.language.blocks) == 3


def random_ids(rows_count: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, tiny_languages.VOCABULARY, (rows_count, length), generator=generator)


@pytest.mark.parametrize("family", tiny_languages.FAMILIES)
def test_causal_family(family: str) -> None:
    """Every family's own logits, without a mask and with an explicit one, past its window too."""
    model = tiny_languages.model(family)
    language = CausalLanguage(model).eval()
    ids_BT = random_ids(2, 11)
    valid_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    valid_BT[1, 7:] = False
    positions_BT = torch.arange(11).expand(2, 11) * valid_BT
    with torch.no_grad():
        embeds_BTD = language.embed(ids_BT)
        theirs = [model(input_ids=ids_BT[:1]).logits[0], model(input_ids=ids_BT[1:, :7]).logits[0]]
        plain = language.logits(language.hidden(LanguageInput(embeds_BTD, valid_BT)))
        allow_BTT = attention_mask(valid_BT.long(), positions_BT + 1, torch.zeros_like(ids_BT))
        inputs = LanguageInput(embeds_BTD, valid_BT, allow_BTT, positions_BT)
        masked = language.logits(language.hidden(inputs))
    for got in (plain, masked):
        torch.testing.assert_close(got[0], theirs[0], **NEAR)
        torch.testing.assert_close(got[1, :7], theirs[1], **NEAR)
    assert len(language.blocks) == 2


@pytest.mark.parametrize("family", tiny_languages.SLIDING)
def test_windows_matter(family: str) -> None:
    """The test above would not see a window that is never used: without it the logits differ."""
    model = tiny_languages.model(family)
    ids_BT = random_ids(1, 11)
    with torch.no_grad():
        narrow = model(input_ids=ids_BT).logits
        name, settings = tiny_languages.FAMILIES[family]
        config = getattr(transformers, f"{name}Config")(**settings | {"sliding_window": 32})
        wide = tiny.seeded(transformers.AutoModelForCausalLM.from_config, config)(input_ids=ids_BT).logits
    torch.testing.assert_close(narrow[:, : tiny_languages.WINDOW], wide[:, : tiny_languages.WINDOW], **NEAR)
    assert (narrow - wide)[:, tiny_languages.WINDOW :].abs().max() > 1e-2


@pytest.mark.parametrize("family", tiny_languages.FAMILIES)
def test_two_way_prefix_is_seen(family: str) -> None:
    """A mask that opens the prompt both ways is kept to: no family adds a causal mask of its own."""
    language = CausalLanguage(tiny_languages.model(family)).eval()
    embeds_BTD = language.embed(random_ids(1, 4)).detach()
    one_BT = torch.ones(1, 4, dtype=torch.long)
    positions_BT = torch.arange(4)[None]
    blocks_BT = torch.tensor([[0, 0, 0, 1]])
    allow_BTT = attention_mask(one_BT, blocks_BT, torch.zeros_like(one_BT))

    def first_and_third(changed: int) -> Tensor:
        other_BTD = embeds_BTD.clone()
        other_BTD[:, changed] *= -1
        with torch.no_grad():
            hidden = [
                language.hidden(LanguageInput(x_BTD, one_BT > 0, allow_BTT, positions_BT))
                for x_BTD in (embeds_BTD, other_BTD)
            ]
        return (hidden[0] - hidden[1]).abs().amax(-1)[0]

    assert first_and_third(2)[0] > 1e-3  # the first token sees the third
    assert first_and_third(3)[:3].max() == 0  # none of the prompt sees what is causal after it


REFUSED = {
    "BloomConfig": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "GPTNeoConfig": {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
        "attention_types": [[["global"], 1]],
    },
    "MambaConfig": {"hidden_size": 32, "num_hidden_layers": 1},
    "Lfm2Config": {"hidden_size": 32, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "FalconConfig": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    """Architectures that would not keep to a mask are refused in one sentence, not run wrongly."""
    getattr(transformers, name)(vocab_size=97, **REFUSED[name]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot read images in sentences here: its? .*; choose one"):
        load_language(tmp_path, "random:")
