"""Ladder side-tuning: the formula written out, what is kept for the backward pass, and every road."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rows
import test_generate
import test_packing
import tiny
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.saved_memory import saved_bytes
from vlm_adapt.adapt.side_tuning import SideTuning
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.language.language import Generation, LanguageInput
from vlm_adapt.vision import build_tower
from vlm_adapt.vision.tower import Tower

torch.set_num_threads(1)
NEAR: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums of some dozen terms, in another order
CONNECTOR = {"method": "full", "where": "connector"}


def line(where: str, **settings: Any) -> dict[str, Any]:
    return {"method": "side_tuning", "where": where, "r": 2, **settings}


def adapted(ours: Any, *lines: dict[str, Any]) -> Any:
    ours.adapt([[Adapt.model_validate(one) for one in lines]])
    return ours


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.vit(folder / "vit", layers=3)
    tiny.llama(folder / "llama", layers=3)
    tiny.t5(folder / "t5")
    return folder


def move(ours: Any) -> None:
    """Give every trained weight another value, so that nothing is right by its start alone."""
    torch.manual_seed(1)
    for item in ours.plan.attached:
        for parameter in item.method.parameters.values():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)


def a_batch(ours: Any) -> Any:
    talks = [["<image>what color is the shape?", "red"], ["no", "yes"]]
    return rows.batch(ours, [rows.conversation(ours, *talk, seed=i) for i, talk in enumerate(talks)])


# The formula -------------------------------------------------------------------------------------


def test_language_written_out(parts: Path) -> None:
    """h = mu h + (1 - mu) Down(b_i), a block of transformers' own class, Up, the frozen norm and head."""
    ours = rows.assemble(parts / "vit", parts / "llama")
    model, language = ours.model.language.model, ours.model.language
    ids_BT = torch.randint(3, 300, (2, 7))
    whole = model(ids_BT, output_hidden_states=True)
    adapted(ours, line("language"), CONNECTOR)
    move(ours)
    method = next(item.method for item in ours.plan.attached if item.where == "language")
    weights = method.parameters
    small = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    small._attn_implementation = "eager"
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    angles = model.model.rotary_emb(whole.hidden_states[0], torch.arange(7)[None])
    # The library's last hidden state has passed the norm already.
    outputs = [*whole.hidden_states[1:-1], last_output(parts, ids_BT)]
    state = whole.hidden_states[0] @ weights["side.start.weight"].T
    for number, output in enumerate(outputs):
        prefix = f"model.model.layers.{number}.side."
        mu = torch.sigmoid(weights[prefix + "gate.alpha"] / 0.1)
        state = mu * state + (1 - mu) * (output @ weights[prefix + "down.weight"].T)
        block = transformers.models.llama.modeling_llama.LlamaDecoderLayer(small, 0)
        own = {k.removeprefix(prefix + "block."): v for k, v in weights.items() if prefix + "block." in k}
        block.load_state_dict(own)
        state = block(state, attention_mask=mask, position_embeddings=angles)
    want = model.lm_head(model.model.norm(state @ weights["side.up.weight"].T))
    embeds_BTD = language.embed(ids_BT)
    got = language.logits(language.hidden(LanguageInput(embeds_BTD, torch.ones(2, 7, dtype=torch.bool))))
    torch.testing.assert_close(got, want, **NEAR)


def last_output(parts: Path, ids_BT: Tensor) -> Tensor:
    """What the last block gives, before the norm."""
    found: list[Tensor] = []
    model = rows.assemble(parts / "vit", parts / "llama").model.language.model
    model.model.layers[-1].register_forward_hook(lambda module, args, output: found.append(output))
    model(ids_BT)
    return found[0]


def test_vision_written_out(parts: Path) -> None:
    """Features of two layers at once: Up of the side state there; the last passes the frozen norm."""
    tower: Any = build_tower(str(parts / "vit"))
    pixels_NCHW = torch.randn(2, 3, 16, 16)
    outputs: list[Tensor] = []
    handles = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in tower.blocks]
    first: list[Tensor] = []
    handles.append(tower.blocks[0].register_forward_pre_hook(lambda m, a: first.append(a[0])))
    with torch.no_grad():
        tower(pixels_NCHW)
    for handle in handles:
        handle.remove()
    method = SideTuning(r=4, temperature=0.5)
    method.attach(Place("vision", tower))
    torch.manual_seed(2)
    for parameter in method.parameters.values():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    w = method.parameters
    state, ups = first[0] @ w["side.start.weight"].T, []
    for number, output in enumerate(outputs):
        b = {k.partition(".side.")[2]: v for k, v in w.items() if f"layers.{number}.side" in k}
        mu = torch.sigmoid(b["gate.alpha"] / 0.5)
        state = mu * state + (1 - mu) * (output @ b["down.weight"].T)
        normed = functional.layer_norm(state, (8,), b["block.norm1.weight"], b["block.norm1.bias"], 1e-12)
        q, k, v = (
            normed @ b[f"block.{n}_proj.weight"].T + b[f"block.{n}_proj.bias"] for n in ("q", "k", "v")
        )
        mixed = (q @ k.transpose(1, 2) * 8**-0.5).softmax(-1) @ v  # one head of 8
        state = state + mixed @ b["block.out_proj.weight"].T + b["block.out_proj.bias"]
        normed = functional.layer_norm(state, (8,), b["block.norm2.weight"], b["block.norm2.bias"], 1e-12)
        inner = functional.gelu(normed @ b["block.fc1.weight"].T + b["block.fc1.bias"])
        state = state + inner @ b["block.fc2.weight"].T + b["block.fc2.bias"]
        ups.append(state @ w["side.up.weight"].T)
    early, late = tower(pixels_NCHW, [0, -1])
    torch.testing.assert_close(early, ups[0][:, 1:], **NEAR)
    torch.testing.assert_close(late, tower.model.layernorm(ups[-1])[:, 1:], **NEAR)
    torch.testing.assert_close(tower(pixels_NCHW, [1])[0], ups[1][:, 1:], **NEAR)


# What is kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["vision", "language"])
def test_nothing_of_the_backbone_is_saved(parts: Path, side: str) -> None:
    """Of all its tensors only outputs of blocks, which are what Down reads; and Up's input for the head."""
    # The connector trains too: its tokens come with a history, which must end before the language's blocks.
    ours = adapted(rows.assemble(parts / "vit", parts / "llama"), line(side), CONNECTOR)
    part = ours.model.vision if side == "vision" else ours.model.language
    inner: dict[int, Tensor] = {}
    rungs: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor) and output.is_floating_point():
            into[output.untyped_storage()._cdata] = output  # held, so that its memory is nobody else's

    for block in part.blocks:
        for module in block.modules():
            into = rungs if module is block else inner
            module.register_forward_hook(lambda m, a, out, into=into: keep(into, out), prepend=True)
    ours.model.train()
    with saved_bytes(ours.model) as saved:
        total, _ = ours.model(a_batch(ours))
    kept = {tensor.untyped_storage()._cdata for tensor in saved.tensors}
    assert len(rungs) == 3 and len(inner) > 20
    assert not kept & (set(inner) - set(rungs))
    assert set(rungs) <= kept  # Down trains: its gradient is made of what it read
    assert total.requires_grad


def test_gradients_reach_what_comes_before(parts: Path) -> None:
    """The connector and the tower learn through the side network's own way in."""
    lines = [line("language"), CONNECTOR, {"method": "full", "where": "vision"}]
    ours = adapted(rows.assemble(parts / "vit", parts / "llama"), *lines)
    total, _ = ours.model(a_batch(ours))
    total.backward()
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
    first = next(ours.model.vision.parameters())
    assert first.grad is not None and first.grad.abs().max() > 0


def test_checkpointing_keeps_less_and_says_the_same(parts: Path) -> None:
    found = []
    for checkpointing in (False, True):
        ours = adapted(rows.assemble(parts / "vit", parts / "llama"), line("vision"), line("language"))
        ours.model.set_activation_checkpointing(checkpointing)
        ours.model.train()
        with saved_bytes(ours.model) as saved:
            total, _ = ours.model(a_batch(ours))
        total.backward()
        grads = {n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None}
        found.append((saved.bytes, float(total.detach()), grads))
    assert found[1][0] < 0.6 * found[0][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)
    test_packing.same(found[0][2], found[1][2])


# Every road --------------------------------------------------------------------------------------


def test_packed_rows_are_read_as_alone(parts: Path) -> None:
    ours = adapted(rows.assemble(parts / "vit", parts / "llama"), line("language"), CONNECTOR)
    move(ours)
    made = test_packing.texts(ours)
    want = test_packing.alone(ours, made)
    losses_N, gradients = test_packing.run(ours, [made[:2], made[2:]])
    torch.testing.assert_close(losses_N, want[0], **test_packing.NEAR)
    test_packing.same(gradients, want[1])


def test_branches_write_what_they_would_alone(parts: Path) -> None:
    ours = adapted(rows.assemble(parts / "vit", parts / "llama", template="plain"), line("language"))
    move(ours)
    groups = [test_generate.QUESTIONS, test_generate.QUESTIONS[:1]]
    made = [
        rows.row(ours, ours.template.questions([(q, None) for q in group], images=1), seed, learn=False)
        for seed, group in enumerate(groups)
    ]
    answers = iter(ours.model.generate(rows.batch(ours, made), Generation(5), set()))
    for seed, group in enumerate(groups):
        for question in group:
            sentence = ours.template.conversation(rows.chat(f"<image>\n{question}"))
            answer = next(answers)
            assert answer == test_generate.forced(ours, sentence, seed, answer)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_bf16_base_without_autocast(parts: Path, attention: str) -> None:
    """The side network computes in its own float32: a packed row with branches, and writing."""
    ours = rows.assemble(parts / "vit", parts / "llama", attention=attention)
    ours.model.to(torch.bfloat16).compute_dtype = torch.bfloat16
    adapted(ours, line("vision"), line("language"))
    ours.model(rows.batch(ours, [test_packing.texts(ours)]))[0].backward()
    assert all(p.grad is not None for p in ours.model.parameters() if p.requires_grad)
    assert len(ours.model.generate(a_batch(ours), Generation(3), set())) == 2


def test_encoder_decoder(parts: Path) -> None:
    """Encoder and decoder have a ladder each; the decoder's reads the encoder's; generation agrees."""
    ours = adapted(rows.assemble(parts / "vit", parts / "t5"), line("language"), CONNECTOR)
    move(ours)
    ours.model(a_batch(ours))[0].backward()
    for item in ours.plan.attached:
        for key, parameter in item.method.parameters.items():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
    talks = [["<image>no", "red blue", "is the shape red?"], ["two"], ["a", "yes", "no"]]
    prompts = [rows.conversation(ours, *talk, seed=i, learn=False) for i, talk in enumerate(talks)]
    answers = ours.model.generate(rows.batch(ours, prompts), Generation(5), set())
    for prompt, answer in zip(prompts, answers, strict=True):
        start = len(prompt.decoder_ids)
        prompt.decoder_ids = torch.cat([torch.tensor(prompt.decoder_ids), torch.tensor(answer[:-1])]).numpy()
        logits_BUV = ours.model.logits(rows.batch(ours, [prompt]))
        assert logits_BUV[0, start - 1 :].argmax(-1).tolist() == answer


def test_fewer_rungs(parts: Path) -> None:
    """`drop` leaves every second out, counted from the last; `blocks` says which."""
    for settings, want in (({"drop": True}, [0, 2]), ({"blocks": "1:"}, [1, 2])):
        ours = adapted(rows.assemble(parts / "vit", parts / "llama"), line("language", **settings))
        keys = [key for key in ours.plan.attached[0].method.parameters if "alpha" in key]
        assert [int(key.split(".")[3]) for key in keys] == want
        ours.model(a_batch(ours))[0].backward()
        assert all(p.grad is not None for p in ours.model.parameters() if p.requires_grad)


# What it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line("language", r=5)], "r 5 does not divide the width 32"),
        ([line("language", r=0)], "a whole number r from 1, not 0"),
        ([line("language", temperature=0)], "a temperature above 0"),
        ([line("language", init="zero")], "init is 'pruned' or 'random', not 'zero'"),
        ([line("language", blocks=[0])], "needs its last block, 2, among `blocks`"),
        ([line("language"), {"method": "lora", "where": "language"}], "nothing in it gets a gradient"),
        ([line("connector")], "is for vision and language, not for 'connector'"),
    ],
)
def test_refused(parts: Path, lines: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        adapted(rows.assemble(parts / "vit", parts / "llama"), *lines)
    tiny.sentence(caught)


def test_hierarchical_towers_are_refused() -> None:
    tower: Tower = build_tower("timm:test_convnext", "random:")
    with pytest.raises(UserError, match="takes plain ViTs") as caught:
        SideTuning().attach(Place("vision", tower))
    tiny.sentence(caught)
