"""Learned vectors take the one road: packed and padded, branches, masks, caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rows
import tiny
import tiny_languages
import torch
import transformers
from grid import forced
from test_packing import NEAR, alone, run, same, texts

from vlm_adapt.config.schema import Adapt
from vlm_adapt.language.language import Generation

torch.set_num_threads(1)
N = 3
PREFIX = {"method": "prefix_tuning", "where": "language", "num_virtual_tokens": N}
PROMPT = {"method": "prompt_tuning", "where": "language", "num_virtual_tokens": N}
ENCODED = {"method": "p_tuning", "where": "language", "num_virtual_tokens": N, "encoder_hidden_size": 6}
ADDED = {"method": "learned_queries", "where": "connector", "tokens": 2}
PLANS: dict[str, list[dict[str, Any]]] = {
    "prompt": [PROMPT],
    "encoded": [ENCODED],
    "prefix": [PREFIX],
    "projected": [PREFIX | {"prefix_projection": True}],
    "both": [PROMPT, PREFIX | {"num_virtual_tokens": 2}, ADDED],
}
SOME = {name: PLANS[name] for name in ("prompt", "prefix", "both")}
QUESTIONS = ["what color is the shape?", "is the circle red?", "no", "two cats yes yes blue"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.vit(folder / "vit")
    tiny.llama(folder / "llama")
    tiny.t5(folder / "t5")
    for family in ("gpt2", "gemma2"):
        tokenizer = tiny.tokenizer(folder / family, bos=family == "gemma2")
        name, settings = tiny_languages.FAMILIES[family]
        more: dict[str, Any] = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        more |= {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
        if family == "gemma2":
            more["sliding_window"] = 200  # of which a row of several texts is longer, and a text is not
        config = getattr(transformers, f"{name}Config")(**settings | more)
        tiny.seeded(transformers.AutoModelForCausalLM.from_config, config).save_pretrained(folder / family)
    return folder


def adapted(parts: Path, language: str, plan: list[dict[str, Any]], **more: Any) -> Any:
    more = {"max_length": 200, "template": "bare"} | more
    ours = rows.assemble(parts / "vit", parts / language, **more)
    torch.manual_seed(3)
    ours.adapt([[Adapt.model_validate(line) for line in plan]])
    return ours


@pytest.mark.parametrize("plan", SOME)
@pytest.mark.parametrize("language", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("prefix_lm", [False, True], ids=["causal", "two-way"])
def test_packed_and_padded_as_alone(parts: Path, plan: str, language: str, prefix_lm: bool) -> None:
    """Several texts a row, texts of unequal length padded, images and branches: every text has its own."""
    ours = adapted(parts, language, PLANS[plan], prefix_lm=prefix_lm)
    made = texts(ours)
    want = alone(ours, made)
    # Every place gets its share of the gradient, of each text.
    assert all(gradient.abs().max() > 0 for name, gradient in want[1].items() if "prompt_emb" in name)
    for packed in ([made[:2], made[2:3], made[3:]], made):
        losses_N, gradients = run(ours, packed)
        torch.testing.assert_close(losses_N, want[0], **NEAR)
        same(gradients, want[1])


@pytest.mark.parametrize("plan", SOME)
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_backends_and_checkpointing(parts: Path, plan: str, attention: str) -> None:
    """One text a row through transformers' eager attention, against all others, kept or computed again."""
    reference = adapted(parts, "llama", PLANS[plan], attention="eager")
    made = texts(reference)
    want = alone(reference, made)
    ours = adapted(parts, "llama", PLANS[plan], attention=attention)
    ours.model.train()
    for enabled in (False, True):
        ours.model.set_activation_checkpointing(enabled)
        losses_N, gradients = run(ours, [made[:3], made[3:]], length=256)
        torch.testing.assert_close(losses_N, want[0], **NEAR)
        same(gradients, want[1])


@pytest.mark.parametrize("plan", SOME)
def test_checkpointing_of_batches_that_overlap(parts: Path, plan: str) -> None:
    """A block that is computed again finds the places of its own batch, whatever ran since."""
    ours = adapted(parts, "llama", PLANS[plan])
    ours.model.train()
    made = [rows.batch(ours, [one]) for one in texts(ours)[:2]]
    made.append(rows.batch(ours, []))
    wanted = []
    for enabled in (False, True):
        ours.model.set_activation_checkpointing(enabled)
        ours.model.zero_grad()
        totals = [ours.model(batch)[0] for batch in made]
        with torch.no_grad():
            ours.model(made[2])
        for total in totals:
            total.backward()
        wanted.append({n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None})
    same(wanted[1], wanted[0])


@pytest.mark.parametrize("plan", ["projected", "both"])
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_a_row_of_padding_reaches_everything(parts: Path, plan: str, language: str) -> None:
    """A rank without a share still runs every module that trains, with weight zero."""
    ours = adapted(parts, language, PLANS[plan])
    for batch in (rows.batch(ours, []), rows.batch(ours, [], length=9)):
        ours.model.zero_grad()
        total, _ = ours.model(batch)
        total.backward()
        for item in ours.plan.attached:
            for name, parameter in item.method.parameters.items():
                assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("plan", ["prefix", "both"])
@pytest.mark.parametrize("language", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("prefix_lm", [False, True], ids=["causal", "two-way"])
def test_greedy_equals_teacher_forcing(parts: Path, plan: str, language: str, prefix_lm: bool) -> None:
    """Prompts of unequal length with images in one batch, through the cache."""
    ours = adapted(parts, language, PLANS[plan], prefix_lm=prefix_lm)
    sentences = [
        ours.template.conversation(rows.chat("<image>" * (number % 3) + question))
        for number, question in enumerate(QUESTIONS)
    ]
    encoded = [rows.row(ours, sentence, seed, learn=False) for seed, sentence in enumerate(sentences)]
    answers = ours.model.generate(rows.batch(ours, encoded), Generation(5), set())
    for seed, (sentence, answer) in enumerate(zip(sentences, answers, strict=True)):
        assert answer == forced(ours, sentence, seed, answer)


@pytest.mark.parametrize("plan", SOME)
def test_branches_write_what_they_would_alone(parts: Path, plan: str) -> None:
    """The questions on an image share one prompt, and one cache."""
    ours = adapted(parts, "llama", PLANS[plan], template="plain")
    groups = [QUESTIONS, QUESTIONS[:1], QUESTIONS[1:3]]
    made = [
        rows.row(ours, ours.template.questions([(q, None) for q in group], images=1), seed, learn=False)
        for seed, group in enumerate(groups)
    ]
    together = iter(ours.model.generate(rows.batch(ours, made), Generation(5), set()))
    for seed, group in enumerate(groups):
        for question in group:
            sentence = ours.template.conversation(rows.chat(f"<image>\n{question}"))
            answer = next(together)
            assert answer == forced(ours, sentence, seed, answer)


@pytest.mark.parametrize("plan", SOME)
def test_encoder_decoder(parts: Path, plan: str, monkeypatch: Any) -> None:
    """Padded prompts: losses as alone; token by token the logits are those of teacher forcing."""
    ours = adapted(parts, "t5", PLANS[plan])
    talks = [(f"{'<image>' * (number % 2)}{q}", "red") for number, q in enumerate(QUESTIONS)]
    made = [rows.conversation(ours, *talk, seed=seed) for seed, talk in enumerate(talks)]
    want = alone(ours, made)
    losses_N, gradients = run(ours, made)
    torch.testing.assert_close(losses_N, want[0], **NEAR)
    same(gradients, want[1])
    asked = [rows.conversation(ours, talk[0], seed=seed, learn=False) for seed, talk in enumerate(talks)]
    batch = rows.batch(ours, asked)
    seen: list[torch.Tensor] = []
    words_B = torch.arange(len(talks)) + 9

    def two_steps(logits_BV: torch.Tensor, step: Any, *rest: Any) -> list[list[int]]:
        seen.extend([logits_BV, step(words_B)])
        return []

    monkeypatch.setattr("vlm_adapt.language.seq2seq.decode", two_steps)
    ours.model.generate(batch, Generation(2), set())
    start_B = torch.full_like(words_B, ours.model.language.start_id)
    batch.decoder_ids_BU = torch.stack([start_B, words_B], 1)
    torch.testing.assert_close(torch.stack(seen, 1), ours.model.logits(batch), **NEAR)


@pytest.mark.parametrize("plan", ["encoded", "projected", "both"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_base(parts: Path, plan: str, autocast: bool) -> None:
    """What trains is float32, the frozen language bf16, with autocast and without."""
    ours = rows.assemble(parts / "vit", parts / "llama", template="bare")
    ours.model.to(torch.bfloat16)
    ours.model.compute_dtype = torch.bfloat16
    torch.manual_seed(3)
    ours.adapt([[Adapt.model_validate(line) for line in PLANS[plan]]])
    reference = adapted(parts, "llama", PLANS[plan])
    made = texts(ours)
    losses_N, _ = run(reference, made)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got_N, gradients = run(ours, [made[:3], made[3:]])
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert (got_N - losses_N).abs().mean() < 0.1  # bf16 keeps 8 bits of logits near 10, and of all before


def test_several_prompts_have_places_of_their_own(parts: Path) -> None:
    """A prefix first, so that prompts see it; each prompt's gradient is that of what lies at its places."""
    ours = adapted(parts, "llama", PLANS["both"])
    prompts = ours.model.language.prompts
    assert [prompt.embeds for prompt in prompts.every] == [False, True]
    assert ours.encoder.prompt_tokens == 2 + N
    batch = rows.batch(ours, [texts(ours)[:2], texts(ours)[2:]])
    shares = list(prompts.share(batch.prompt_positions_DP).values())
    assert len(shares[0]) == 2 * 5 and len(shares[1]) == N * 5
    assert (shares[0].view(-1, 2)[:, -1] + 1 == shares[1].view(-1, N)[:, 0]).all()
    assert batch.positions_BT.flatten()[shares[0]].view(-1, 2).tolist() == [[0, 1]] * 5
    inputs = ours.model.inputs(batch)
    assert not inputs.positions_BT.flatten()[shares[0]].any()
    assert (inputs.positions_BT.flatten()[shares[1]].view(-1, N) == torch.tensor([2, 3, 4])).all()
    for item in ours.plan.attached:
        item.method.set_active(False)
    assert (ours.encoder.prompt_tokens, ours.encoder.tokens_per_image) == (0, 4)


@pytest.mark.parametrize(
    ("language", "prefix_lm"), [("llama", False), ("llama", True), ("gpt2", False), ("t5", True)]
)
def test_a_model_without_prompts_reads_over_the_places(parts: Path, language: str, prefix_lm: bool) -> None:
    """A teacher's losses, and those of switched-off vectors, are the base's on the student's own batches."""
    base = rows.assemble(parts / "vit", parts / language, template="bare", prefix_lm=prefix_lm)
    ours = adapted(parts, language, [PROMPT, PREFIX], prefix_lm=prefix_lm)
    made, plain = (texts(one)[:3] for one in (ours, base))
    want, _ = run(base, plain)
    for packed in ([made[:2], made[2:]], made):
        if language == "t5" and packed is not made:
            continue
        got, _ = run(base, packed)
        torch.testing.assert_close(got, want, **NEAR)
    prompts = [rows.row(ours, ours.template.conversation(rows.chat(q)), learn=False) for q in QUESTIONS]
    bare = [rows.row(base, base.template.conversation(rows.chat(q)), learn=False) for q in QUESTIONS]
    written = [base.model.generate(rows.batch(base, r), Generation(4), set()) for r in (prompts, bare)]
    assert written[0] == written[1]
    batch = rows.batch(ours, made)
    for item in ours.plan.attached:
        item.method.set_active(False)
    torch.testing.assert_close(ours.model(batch)[1], want, **NEAR)
