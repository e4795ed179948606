"""Several texts in a row read exactly as each alone: losses, gradients, and nothing seen of each other."""

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

torch.set_num_threads(1)
# Alone and together sums are cut into other pieces and added in other orders: float32 rounds losses of
# size 10 at 1e-6. A token that saw another text, or stood at another position, would differ by 1e-2 and more.
NEAR = {"atol": 1e-5, "rtol": 0.0}
# Several have a window of 4, which every text here is longer than; OPT and GPT-2 have learned positions.
LANGUAGES = "llama qwen2 qwen2_sliding qwen3 gemma2 gemma3 mistral smollm3 gpt2 opt".split()
PAIRS = [("what color is the shape?", "red"), ("is the circle red?", "yes"), ("two", "a photo of cats")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.vit(folder / "vit")
    for family in LANGUAGES:
        tokenizer = tiny.tokenizer(folder / family, bos=family.startswith("gemma"))
        name, settings = tiny_languages.FAMILIES[family]
        long = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
        more = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        config = getattr(transformers, f"{name}Config")(**settings | more | long)
        tiny.seeded(transformers.AutoModelForCausalLM.from_config, config).save_pretrained(folder / family)
    return folder


def texts(ours: Any) -> list[Any]:
    """With no image, one, and two; short and long; and one whose questions are branches."""
    made = [
        rows.conversation(ours, "no", "yes"),
        rows.conversation(ours, "<image>what color is the shape?", "red", seed=1),
        rows.conversation(ours, "<image>two<image> " + "circle square " * 6, "a photo of two cats", seed=2),
        rows.row(ours, ours.template.questions(PAIRS, 1), seed=3),
    ]
    if not ours.template.prompt_is_causal:
        return made
    return [*made, rows.conversation(ours, "blue", "green", "<image>red?", "no no", seed=4)]


def run(ours: Any, packed: Any, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the targets, and the gradients of a step."""
    ours.model.zero_grad()
    total, losses_N = ours.model(rows.batch(ours, packed, **more))
    total.backward()
    return losses_N, {n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None}


def alone(ours: Any, each: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, text by text."""
    losses: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    for text in each:
        losses_N, gradients = run(ours, [text])
        losses.append(losses_N)
        for name, gradient in gradients.items():
            sums[name] = sums[name] + gradient if name in sums else gradient.clone()
    return torch.cat(losses), sums


def same(first: dict[str, Tensor], second: dict[str, Tensor], near: float = 1e-5) -> None:
    """Gradients round relative to the largest entry, which is a sum over many tokens."""
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        largest = max(1.0, float(second[name].abs().max()))
        torch.testing.assert_close(
            gradient, second[name], atol=near * largest, rtol=0, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("family", LANGUAGES)
@pytest.mark.parametrize("prompt", ["causal", "two-way"])
def test_as_alone(parts: Path, family: str, prompt: str) -> None:
    """Rows of several texts with images and branches, and a row's end left over."""
    ours = rows.assemble(parts / "vit", parts / family, prefix_lm=prompt == "two-way", template="bare")
    made = texts(ours)
    want = alone(ours, made)
    for packed in ([made], [made[:2], made[2:3], made[3:]]):
        losses_N, gradients = run(ours, packed)
        torch.testing.assert_close(losses_N, want[0], **NEAR)
        same(gradients, want[1])


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2"])
def test_every_backend_of_this_machine(parts: Path, family: str) -> None:
    """Text by text and with the whole mask, against one text a row as torch's own attention reads it."""
    reference = rows.assemble(parts / "vit", parts / family, attention="sdpa")
    made = texts(reference)
    want = alone(reference, made)
    for attention in ("auto", "sdpa", "eager"):
        ours = rows.assemble(parts / "vit", parts / family, attention=attention)
        losses_N, gradients = run(ours, [made[:3], made[3:]], length=256)
        torch.testing.assert_close(losses_N, want[0], **NEAR)
        same(gradients, want[1])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_lora_and_checkpointing(parts: Path, family: str) -> None:
    """Adapters and connector get the same gradients, with activations kept or computed again."""
    from vlm_adapt.config.schema import Adapt

    ours = rows.assemble(parts / "vit", parts / family)
    lines = [{"method": "full", "where": "connector"}, {"method": "lora", "where": "language", "r": 4}]
    ours.adapt([[Adapt.model_validate(line) for line in lines]])
    for name, parameter in ours.model.named_parameters():
        if "lora_B" in name:  # zero at first, which hides A's gradient
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    made = texts(ours)
    want = alone(ours, made)
    assert any("lora_A" in name for name in want[1]) and any(n.startswith("connector") for n in want[1])
    for enabled in (False, True):
        ours.model.train()
        ours.model.set_activation_checkpointing(enabled)
        losses_N, gradients = run(ours, [made[:3], made[3:]])
        torch.testing.assert_close(losses_N, want[0], **NEAR)
        same(gradients, want[1])


@pytest.mark.parametrize("enabled", [False, True])
def test_bfloat16(parts: Path, enabled: bool) -> None:
    """As the engine trains: weights in bf16 under autocast."""
    ours = rows.assemble(parts / "vit", parts / "llama")
    ours.model.to(torch.bfloat16)
    ours.model.compute_dtype = torch.bfloat16
    ours.model.train()
    ours.model.set_activation_checkpointing(enabled)
    made = texts(ours)
    with torch.autocast("cpu", torch.bfloat16):
        want = alone(ours, made)
        losses_N, gradients = run(ours, [made[:3], made[3:]])
    # bf16 keeps 8 bits: logits near 10 round at 0.03, and two layers of other pieces add up to some of that.
    torch.testing.assert_close(losses_N, want[0], atol=0.1, rtol=0)
    assert (losses_N - want[0]).abs().mean() < 0.02
    for name, gradient in gradients.items():
        other = want[1][name].float()
        assert (gradient.float() - other).norm() < 0.05 * other.norm() + 1e-6, name


@pytest.mark.parametrize("family", LANGUAGES)
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_no_text_sees_another(parts: Path, family: str, changed: int) -> None:
    """Other words and another picture in one text: every other text's logits stay the same to the bit."""
    ours = rows.assemble(parts / "vit", parts / family)
    made = [rows.conversation(ours, f"<image>{q}", a, seed=i) for i, (q, a) in enumerate(PAIRS)]
    batch = rows.batch(ours, [made], length=120)
    before = ours.model.logits(batch)
    mine_BT = batch.documents_BT == changed + 1
    batch.ids_BT[mine_BT] = batch.ids_BT[mine_BT].flip(0)
    batch.pixels_ICHW[changed] = 255 - batch.pixels_ICHW[changed]
    after = ours.model.logits(batch)
    others_BT = ~mine_BT & (batch.documents_BT > 0)
    assert torch.equal(before[others_BT], after[others_BT])
    assert (before[mine_BT] - after[mine_BT]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["causal", "two-way", "branches"])
def test_padding_costs_nothing(parts: Path, kind: str) -> None:
    """The blocks are run on the texts' tokens alone, however long the rows are."""
    ours = rows.assemble(parts / "vit", parts / "llama", prefix_lm=kind == "two-way")
    made = [rows.conversation(ours, "no", "yes"), rows.conversation(ours, "red", "blue", seed=1)]
    if kind == "branches":
        made[0] = rows.row(ours, ours.template.questions(PAIRS, 0))
    seen: list[tuple[int, ...]] = []
    ours.model.language.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    for packed in ([made], made):
        ours.model.language.packing_checked = True  # its trial would be seen too
        ours.model(rows.batch(ours, packed, length=200))
        assert seen.pop() == (1, sum(map(len, made)), 32)


def test_embedding_objective(parts: Path) -> None:
    """The warm start of the connector: texts of a row are told apart there too."""
    ours = rows.assemble(parts / "vit", parts / "llama")
    ours.model.objective = "embedding"
    made = texts(ours)
    want = alone(ours, made)
    losses_N, gradients = run(ours, [made[:2], made[2:]])
    torch.testing.assert_close(losses_N, want[0], **NEAR)
    same(gradients, want[1])
    assert losses_N[: len(made[0].targets)].abs().max() == 0  # the text without an image has no loss


def test_encoder_decoders_do_not_pack(tmp_path: Path) -> None:
    ours = rows.assemble(tiny.vit(tmp_path / "v"), tiny.t5(tmp_path / "t5"))
    made = [rows.conversation(ours, "no", "yes"), rows.conversation(ours, "red", "blue")]
    with pytest.raises(ValueError, match="one text each"):
        rows.batch(ours, [made])
