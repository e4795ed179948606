"""Prefix tuning: its formula, its counts, and that peft computes the same from the file that is written."""

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

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.prefix_tuning import PrefixTuning, heads_first
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage
from vlm_adapt.language.seq2seq import Seq2SeqLanguage

torch.set_num_threads(1)
# Keys of their own projection, behind norms of heads on either side of a transposition and of the whole
# width, in one projection with the queries, with groups, rotary embeddings, position tables.
LANGUAGES = (
    "llama qwen2 qwen3 gemma gemma3 phi phi3 olmo2 stablelm starcoder2 cohere2 smollm3 gpt_neox gpt2 opt"
).split()
# Sums of some hundred numbers of size 1, added in another order by another attention.
NEAR = {"atol": 2e-5, "rtol": 0.0}
LINE = {"method": "prefix_tuning", "where": "language"}
N = 3


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.vit(folder / "vit")
    tiny.llama(folder / "llama")
    tiny.t5(folder / "t5")
    for family in LANGUAGES[1:]:
        tokenizer = tiny.tokenizer(folder / family, bos=family.startswith("gemma"))
        name, settings = tiny_languages.FAMILIES[family]
        long = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
        more: dict[str, Any] = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        if "sliding_window" in settings:
            more["sliding_window"] = 64  # beyond these texts
        config = getattr(transformers, f"{name}Config")(**settings | more | long)
        tiny.seeded(transformers.AutoModelForCausalLM.from_config, config).save_pretrained(folder / family)
    return folder


def adapted(parts: Path, family: str, seed: int = 3, **settings: Any) -> Any:
    ours = rows.assemble(parts / "vit", parts / family, template="bare", max_length=64)
    torch.manual_seed(seed)
    ours.adapt([[Adapt.model_validate(LINE | {"num_virtual_tokens": N} | settings)]])
    return ours


def saved(ours: Any, folder: Path) -> None:
    method = ours.plan.attached[0].method
    method.save(folder, {key: p.detach().clone() for key, p in method.parameters.items()})


@pytest.mark.parametrize(
    ("family", "projected"), [*((family, False) for family in LANGUAGES), ("llama", True), ("gpt2", True)]
)
def test_peft_computes_the_same(parts: Path, tmp_path: Path, family: str, projected: bool) -> None:
    """On plain text: our places with keys and values overwritten, and peft's cache of them."""
    from peft import PeftModel

    ours = adapted(parts, family, prefix_projection=projected)
    talks = [("no two", "yes"), ("what color is the shape?", "red")]
    batch = rows.batch(ours, [rows.conversation(ours, *talk) for talk in talks])
    got_BTV = ours.model.logits(batch)
    saved(ours, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(parts / family).eval()
    bare_BTV = base(batch.ids_BT[:, N:]).logits.detach()
    theirs: Any = PeftModel.from_pretrained(base, tmp_path)
    valid_BT = batch.documents_BT > 0
    for row, length in enumerate(valid_BT.sum(1).tolist()):
        ids_1T = batch.ids_BT[row : row + 1, N:length]
        with torch.no_grad():
            want_TV = theirs(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits[0]
        torch.testing.assert_close(got_BTV[row, N:length], want_TV, **NEAR)
        assert (bare_BTV[row, : length - N] - want_TV).abs().max() > 1e-2


def attend(query_HTd: Tensor, keys_HSd: Tensor, values_HSd: Tensor, prefix: int) -> Tensor:
    """softmax([P_k; K] q / sqrt(d)) [P_v; V]: everyone sees the prefix, and of the text what is before it."""
    scores_HTS = query_HTd @ keys_HSd.transpose(1, 2) / query_HTd.shape[-1] ** 0.5
    length = query_HTd.shape[1]
    seen_TS = torch.ones(length, prefix + length, dtype=torch.bool).tril(prefix)
    return scores_HTS.masked_fill(~seen_TS, -torch.inf).softmax(-1) @ values_HSd


def test_the_formula(parts: Path) -> None:
    """The first block's attention, written out, with rotary embeddings and two groups for four heads."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    ours = adapted(parts, "llama")
    batch = rows.batch(ours, [rows.conversation(ours, "what color is the shape?", "red")])
    decoder: Any = ours.model.language.decoder
    attention = decoder.layers[0].self_attn
    seen: dict[str, Tensor] = {}
    attention.register_forward_hook(lambda m, a, out: seen.update(out=out[0][0]))
    ours.model.logits(batch)
    with torch.no_grad():
        x_TD = decoder.layers[0].input_layernorm(ours.model.language.embed(batch.ids_BT[0, N:]))
        length = len(x_TD)
        query_1HTd = attention.q_proj(x_TD).view(1, length, 4, 8).transpose(1, 2)
        key_1GTd = (x_TD @ attention.k_proj.weight.T).view(1, length, 2, 8).transpose(1, 2)
        value_GTd = (x_TD @ attention.v_proj.weight.T).view(length, 2, 8).transpose(0, 1)
        cos, sin = decoder.rotary_emb(x_TD[None], torch.arange(N, N + length)[None])
        query_1HTd, key_1GTd = apply_rotary_pos_emb(query_1HTd, key_1GTd, cos, sin)
        vectors = ours.plan.attached[0].method.vectors()
        prefix_k, prefix_v = (v.view(N, 2, 8).transpose(0, 1) for v in (vectors[:, :16], vectors[:, 16:32]))
        keys = torch.cat([prefix_k, key_1GTd[0]], 1).repeat_interleave(2, 0)
        values = torch.cat([prefix_v, value_GTd], 1).repeat_interleave(2, 0)
        want_HTd = attend(query_1HTd[0], keys, values, N)
        want_TD = attention.o_proj(want_HTd.transpose(0, 1).flatten(1))
    torch.testing.assert_close(seen["out"].view(-1, 32)[N : N + length], want_TD, **NEAR)


def test_the_formula_of_an_encoder_decoder(parts: Path) -> None:
    """T5: the cross-attention of the second block of the decoder, which has no bias."""
    ours = adapted(parts, "t5")
    batch = rows.batch(ours, [rows.conversation(ours, "what color is the shape?", "red")])
    language = ours.model.language
    vectors = ours.plan.attached[0].method.vectors()
    assert vectors.shape == (N, 4 * 2 * 32)  # two blocks of the encoder, two of the decoder
    cross = language.model.decoder.block[1].layer[1].EncDecAttention
    seen: dict[str, Any] = {}
    cross.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(args=args, kwargs=kwargs, out=out[0]), with_kwargs=True
    )
    ours.model.logits(batch)
    states_UD = seen["args"][0][0] if seen["args"] else seen["kwargs"]["hidden_states"][0]
    encoded_TD = seen["kwargs"]["key_value_states"][0, N:]
    with torch.no_grad():

        def heads(x_TI: Tensor) -> Tensor:
            return x_TI.view(-1, 4, 8).transpose(0, 1)

        query_HUd = heads(states_UD @ cross.q.weight.T)
        keys = torch.cat([vectors[:, 3 * 64 : 3 * 64 + 32], encoded_TD @ cross.k.weight.T])
        values = torch.cat([vectors[:, 3 * 64 + 32 :], encoded_TD @ cross.v.weight.T])
        mixed_HUd = (query_HUd @ heads(keys).transpose(1, 2)).softmax(-1) @ heads(values)
        want_UD = cross.o(mixed_HUd.transpose(0, 1).flatten(1))
    torch.testing.assert_close(seen["out"][0], want_UD, **NEAR)


def count(language: Any, **settings: Any) -> int:
    method = PrefixTuning(**settings)
    language.tokenizer = None
    method.attach(Place("language", language))
    return sum(p.numel() for p in method.parameters.values())


def test_counts() -> None:
    """n L 2 n_kv d_h; with the MLP at n 20, h 512 on a 768-wide 12-layer language 9,864,704."""
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        small = transformers.LlamaConfig(  # SmolLM2 135M
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152,
        )  # fmt: skip
        llama = transformers.LlamaForCausalLM(small)
        t5 = transformers.T5ForConditionalGeneration(transformers.T5Config())
    assert count(CausalLanguage(gpt2), num_virtual_tokens=20) == 20 * 12 * 2 * 768
    projected = {"num_virtual_tokens": 20, "prefix_projection": True, "encoder_hidden_size": 512}
    assert count(CausalLanguage(gpt2), **projected) == 9_864_704
    assert count(CausalLanguage(llama), num_virtual_tokens=20) == 20 * 30 * 2 * 3 * 64 == 230_400
    assert count(Seq2SeqLanguage(t5), num_virtual_tokens=10) == 10 * (6 + 6) * 2 * 512


def test_heads_before_or_behind_the_tokens() -> None:
    """By the shape; where as many tokens as heads are there, by the order in memory."""
    for tokens in (3, 4):
        behind = torch.zeros(2, tokens, 4, 8)
        assert not heads_first(behind, slice(0, 32))
        assert heads_first(behind.transpose(1, 2), slice(0, 32))


def test_what_is_refused(parts: Path) -> None:
    for settings, words in (
        ({"num_virtual_tokens": 0}, "whole number from 1"),
        ({"prefix_projection": 1}, "true or false"),
        ({"encoder_hidden_size": 8}, "is for prefix_projection: true"),
        ({"init_std": -1}, "a number from 0"),
        ({"blocks": [0]}, "leave `blocks`"),
        ({"num_virtual_tokens": 64}, "raise model.language.max_length"),
    ):
        with pytest.raises(UserError) as caught:
            adapted(parts, "llama", **settings)
        assert words in tiny.sentence(caught)
    # A window of 64 and texts of 65: the last token would no longer see its prefix.
    ours = rows.assemble(parts / "vit", parts / "gemma3", max_length=65)
    with pytest.raises(UserError) as caught:
        ours.adapt([[Adapt.model_validate(LINE)]])
    assert "cannot stay in sight" in tiny.sentence(caught)


def test_an_attention_that_is_not_known(parts: Path) -> None:
    """Keys that are nowhere to be found, or go through something unknown."""
    ours = rows.assemble(parts / "vit", parts / "llama", max_length=64)
    attention: Any = ours.model.language.decoder.layers[1].self_attn
    attention.qk_norm = torch.nn.Identity()
    with pytest.raises(UserError) as caught:
        ours.adapt([[Adapt.model_validate(LINE)]])
    assert "'qk_norm' in the attention of llama" in tiny.sentence(caught)
    del attention.qk_norm
    attention.keys, attention.k_proj = attention.k_proj, None
    with pytest.raises(UserError) as caught:
        ours.adapt([[Adapt.model_validate(LINE)]])
    assert "does not know where this language (llama) makes keys and values in block" in tiny.sentence(caught)


def test_layers_that_are_wrapped_and_unwrapped(parts: Path) -> None:
    """A layer that another method puts in later, or that merging leaves, has the prefix too."""
    ours = adapted(parts, "llama")
    batch = rows.batch(ours, [rows.conversation(ours, "what color is the shape?", "red")])
    want = ours.model.logits(batch)

    class Around(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module, more: float):
            super().__init__()
            self.layer, self.more = layer, more

        def forward(self, x_BTD: Tensor) -> Tensor:
            return self.layer(x_BTD) + self.more

    for block in ours.model.language.decoder.layers:
        attention: Any = block.self_attn
        before = attention.k_proj
        attention.k_proj = Around(Around(before, 5.0), -5.0)
        torch.testing.assert_close(ours.model.logits(batch), want, **NEAR)
        attention.k_proj = attention.k_proj.layer
        changed = ours.model.logits(batch)
        assert (changed - want).abs().max() > 1e-3
        attention.k_proj = before
        assert torch.equal(ours.model.logits(batch), want)
