"""Prompt tuning, P-tuning and learned queries: formulas, counts, files, and that peft reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rows
import tiny
import torch
import transformers

from vlm_adapt.adapt.p_tuning import PTuning
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.prompt_tuning import COMMON, LATENT, PromptTuning
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage

torch.set_num_threads(1)
NEAR = {"atol": 1e-5, "rtol": 0.0}  # the same numbers, through transformers' own attention
N = 3
PROMPT = {"method": "prompt_tuning", "where": "language", "num_virtual_tokens": N}
ENCODED = {"method": "p_tuning", "where": "language", "num_virtual_tokens": N, "encoder_hidden_size": 6}
LSTM = ENCODED | {"encoder_reparameterization_type": "LSTM"}
QUERIES = {"method": "learned_queries", "where": "connector"}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.vit(folder / "vit")
    tiny.llama(folder / "llama")
    tiny.t5(folder / "t5")
    return folder


def adapted(parts: Path, line: dict[str, Any], language: str = "llama", **more: Any) -> Any:
    more = {"max_length": 64, "template": "bare"} | more
    ours = rows.assemble(parts / "vit", parts / language, **more)
    torch.manual_seed(3)
    ours.adapt([[Adapt.model_validate(line)]])
    return ours


def method_of(ours: Any) -> Any:
    return ours.plan.attached[0].method


def tensors(method: Any) -> dict[str, torch.Tensor]:
    return {key: parameter.detach().clone() for key, parameter in method.parameters.items()}


def talk(ours: Any, text: str = "what color is the shape?") -> Any:
    return rows.batch(ours, [rows.conversation(ours, text, "red"), rows.conversation(ours, "no", "yes")])


@pytest.mark.parametrize("line", [PROMPT, ENCODED, LSTM], ids=["prompt", "mlp", "lstm"])
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_peft_computes_the_same(parts: Path, tmp_path: Path, line: dict[str, Any], language: str) -> None:
    """On plain text, from the file we write; and transformers does, given the vectors before the words."""
    from peft import PeftModel

    ours = adapted(parts, line, language)
    method = method_of(ours)
    batch = talk(ours)
    got = ours.model.logits(batch)
    method.save(tmp_path, tensors(method))
    kind = getattr(transformers, "AutoModelForSeq2SeqLM" if language == "t5" else "AutoModelForCausalLM")
    base = kind.from_pretrained(parts / language).eval()
    length = int((batch.documents_BT[0] > 0).sum())
    ids_1T = batch.ids_BT[:1, N:length]
    more = {"decoder_input_ids": batch.decoder_ids_BU[:1]} if language == "t5" else {}
    words_1TD = base.get_input_embeddings()(ids_1T)
    with torch.no_grad():
        embeds_1TD = torch.cat([method.vectors()[None], words_1TD], 1)
        want = base(inputs_embeds=embeds_1TD, **more).logits[0]
        bare = base(inputs_embeds=words_1TD, **more).logits[0]
        theirs = PeftModel.from_pretrained(base, tmp_path)(
            input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), **more
        ).logits[0]
    torch.testing.assert_close(got[0, : len(want)], want, **NEAR)
    torch.testing.assert_close(got[0, : len(want)], theirs, **NEAR)
    assert (bare - want[-len(bare) :]).abs().max() > 1e-3


def test_the_formulas_of_the_encoders(parts: Path) -> None:
    """The MLP, and that an LSTM read both ways lets every vector know of all others."""
    method = method_of(adapted(parts, ENCODED))
    p = method.parameters
    hidden = torch.relu(p["embedding.weight"] @ p["mlp_head.0.weight"].T + p["mlp_head.0.bias"])
    hidden = torch.relu(hidden @ p["mlp_head.2.weight"].T + p["mlp_head.2.bias"])
    want_PD = hidden @ p["mlp_head.4.weight"].T + p["mlp_head.4.bias"]
    torch.testing.assert_close(method.vectors(), want_PD, atol=1e-6, rtol=0)
    for kind, others in ((ENCODED, False), (LSTM, True)):
        method = method_of(adapted(parts, kind))
        before = method.vectors().detach()
        method.parameters["embedding.weight"].data[N - 1] += 1
        changed = (method.vectors() - before).abs().amax(1) > 1e-6
        assert changed.tolist() == [others] * (N - 1) + [True]


def test_counts() -> None:
    """n d; with an MLP n d + (d h + h) + (h h + h) + (h d + d)."""
    with torch.device("meta"):
        language = CausalLanguage(transformers.GPT2LMHeadModel(transformers.GPT2Config()))
    place = Place("language", language)
    method: Any = PromptTuning(num_virtual_tokens=20)
    method.attach(place)
    assert sum(p.numel() for p in method.parameters.values()) == 20 * 768
    assert method.bytes_stored() == 4 * 20 * 768
    method = PTuning(num_virtual_tokens=20, encoder_hidden_size=128)
    method.attach(place)
    mlp = 768 * 128 + 128 + 128 * 128 + 128 + 128 * 768 + 768
    assert sum(p.numel() for p in method.parameters.values()) == 20 * 768 + mlp
    assert method.bytes_stored() == 4 * 20 * 768
    assert {p.device.type for p in language.parameters()} == {"meta"}


def test_where_it_begins(parts: Path) -> None:
    """Drawn words, given words, or numbers in -0.5 to 0.5."""
    for settings in ({}, {"init_text": "what color"}, {"init": "random"}, {"init_text": "red green blue no"}):
        ours = adapted(parts, PROMPT | settings)
        words_VD = ours.model.language.embed(torch.arange(len(ours.tokenizer)))
        vectors_PD = method_of(ours).vectors().detach()
        near = (vectors_PD[:, None] - words_VD).abs().amax(2).min(1)
        if settings == {"init": "random"}:
            assert near.values.min() > 0.1 and vectors_PD.abs().max() <= 0.5
            continue
        assert not near.values.any()
        if "init_text" in settings:
            ids = ours.tokenizer.encode(settings["init_text"], add_special_tokens=False)
            assert near.indices.tolist() == (ids * N)[:N]
        else:
            assert near.indices.max() < COMMON and len(set(near.indices.tolist())) > 1


@pytest.mark.parametrize(
    "line",
    [ENCODED, LSTM, ENCODED | {"method": "prefix_tuning", "prefix_projection": True}],
    ids=["mlp", "lstm", "prefix"],
)
def test_files_with_and_without_the_encoder(parts: Path, tmp_path: Path, line: dict[str, Any]) -> None:
    """The vectors alone are enough to use it and to go on; with the encoder it goes on as it was."""
    ours = adapted(parts, line)
    method = method_of(ours)
    want = ours.model.logits(talk(ours))
    method.save(tmp_path, tensors(method))
    stored = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert method.bytes_stored() <= stored < method.bytes_stored() + 200
    keys = set(method.parameters)
    for latent in (False, True):
        if latent:
            method.save_latent(tmp_path, tensors(method))
        assert (tmp_path / LATENT).is_file() == latent
        again = adapted(parts, line)
        mine = method_of(again)
        for parameter in mine.parameters.values():
            parameter.data.zero_()
        found = mine.read(tmp_path)
        assert (set(mine.parameters) == keys) == latent and set(found) == set(mine.parameters)
        for key, parameter in mine.parameters.items():
            assert parameter.requires_grad
            parameter.data.copy_(found[key])
        torch.testing.assert_close(again.model.logits(talk(again)), want, **NEAR)


def test_saving_draws_nothing(parts: Path, tmp_path: Path) -> None:
    """A run that saves on the way goes on as one that does not."""
    method = method_of(adapted(parts, LSTM))
    before = torch.get_rng_state()
    method.save(tmp_path, tensors(method))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("connector", ["mlp", "resampler"])
def test_tokens_added_to_images(parts: Path, connector: str) -> None:
    """Each image's own tokens, then the learned ones, the same for all."""
    base = rows.assemble(parts / "vit", parts / "llama", connector, template="bare", max_length=512)
    ours = adapted(parts, QUERIES | {"tokens": 2}, connector=connector, max_length=512)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    own_NKD, all_NKD = base.model.image_tokens(pixels), ours.model.image_tokens(pixels)
    assert torch.equal(all_NKD[:, :-2], own_NKD)
    assert torch.equal(all_NKD[:, -2:], method_of(ours).appended.tokens_KD.expand(3, -1, -1))
    assert ours.encoder.tokens_per_image == base.encoder.tokens_per_image + 2
    texts = [one.encoder.encode(one.template.questions([("no", "a")], 2), 2, "k") for one in (base, ours)]
    assert len(texts[1]) == len(texts[0]) + 4
    method_of(ours).set_active(False)
    assert torch.equal(ours.model.image_tokens(pixels), own_NKD)
    assert ours.encoder.tokens_per_image == base.encoder.tokens_per_image


@pytest.mark.parametrize(("connector", "name"), [("resampler", "latents"), ("qformer", "query_tokens")])
def test_a_connectors_own_queries(parts: Path, connector: str, name: str) -> None:
    """They alone train; switched off they are the connector's own again."""
    options = {"config": SMALL, "queries": 4} if connector == "qformer" else {"latents": 4, "depth": 1}
    from vlm_adapt.config.schema import Model
    from vlm_adapt.models.build import build

    tree = {
        "vision": {"model": str(parts / "vit")},
        "connector": {"name": connector, **options},
        "language": {"model": str(parts / "llama")},
    }
    ours = build(Model.model_validate(tree), torch.float32)
    ours.adapt([[Adapt.model_validate(QUERIES)]])
    method = method_of(ours)
    assert list(method.parameters) == [name]
    assert [n for n, p in ours.model.connector.named_parameters() if p.requires_grad] == [name]
    before = method.parameters[name].detach().clone()
    method.parameters[name].data += 1
    method.set_active(False)
    assert torch.equal(method.parameters[name], before)
    method.set_active(True)
    assert torch.equal(method.parameters[name], before + 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (PROMPT | {"num_virtual_tokens": 64}, "prompts take 64 places in every text, of 64 tokens"),
        (PROMPT | {"num_virtual_tokens": True}, "a whole number from 1, not True"),
        (PROMPT | {"init": "text"}, "go together"),
        (PROMPT | {"init": "zero"}, "vocabulary, text or random, not 'zero'"),
        (PROMPT | {"blocks": -1}, "leave `blocks` of its line out"),
        (PROMPT | {"where": "vision"}, "is for language, not for 'vision'"),
        (ENCODED | {"encoder_reparameterization_type": "GRU"}, "is MLP or LSTM, not 'GRU'"),
        (ENCODED | {"encoder_dropout": 1}, "a share from 0 to 1"),
        (QUERIES, "has no queries of its own"),
        (QUERIES | {"tokens": 0}, "a whole number from 1, not 0"),
    ],
)
def test_what_is_refused(parts: Path, line: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        adapted(parts, line)
    assert words in tiny.sentence(caught)


def test_a_batch_of_before(parts: Path) -> None:
    """Texts encoded without places are not read as if they had them."""
    before = talk(rows.assemble(parts / "vit", parts / "llama"))
    with pytest.raises(ValueError, match="0 places for learned vectors and the model has 3"):
        adapted(parts, PROMPT).model.logits(before)
