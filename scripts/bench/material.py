"""What both sides of the training benchmark share: sizes, weights on disk, and rows of token ids.

Knows how to make a random Llava and its three parts in a folder; knows nothing about trainers or timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VARIABLE = (281, 420, 935)  # tokens a sample with its image: mean, 95th percentile, maximum


@dataclass(frozen=True)
class Sizes:
    """Of the model and the batch; `length` counts the image's tokens too."""

    width: int = 384
    inner: int = 1408
    layers: int = 8
    heads: int = 6
    vocabulary: int = 32000
    vision_width: int = 192
    vision_layers: int = 12
    image: int = 224
    patch: int = 16
    batch: int = 8
    length: int = 256
    rank: int = 16
    rate: float = 2e-4

    @property
    def image_tokens(self) -> int:
        """Patches of an image, each a token."""
        return (self.image // self.patch) ** 2


TINY = Sizes(32, 64, 2, 4, 300, 32, 2, 32, 16, 4, 24, 4)


@dataclass
class Row:
    """One sample: text after the image's tokens, and how many of its last tokens are learned."""

    text: np.ndarray
    learned: int
    pixels: np.ndarray


def make_rows(sizes: Sizes, count: int, variable: bool, seed: int = 0) -> list[Row]:
    """Random rows; half of the text is an answer.

    Args:
        variable: draw the text's length from a log-normal with VARIABLE's mean and 95th percentile, cut
            at its maximum; otherwise every row has `sizes.length` tokens.
    """
    generator = np.random.default_rng(seed)
    image = sizes.image_tokens
    rows = []
    for _ in range(count):
        length = sizes.length - image
        if variable:
            mean, high, longest = (value - image if value > image else value for value in VARIABLE)
            # mean = exp(m + s^2/2) and high = exp(m + 1.645 s); the smaller root in s
            spread = 1.645 - np.sqrt(1.645**2 - 2 * np.log(high / mean))
            drawn = generator.lognormal(np.log(mean) - spread**2 / 2, spread)
            length = int(np.clip(drawn, 8, longest))
        pixels = generator.integers(0, 256, (3, sizes.image, sizes.image)).astype(np.uint8)
        rows.append(Row(generator.integers(10, sizes.vocabulary, length), length // 2, pixels))
    return rows


def save_model(folder: Path, sizes: Sizes) -> int:
    """Random weights as a whole Llava and as our three parts; returns the number of parameters."""
    import torch
    import transformers
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    vision = transformers.CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=max(1, sizes.vision_width // 64),
        image_size=sizes.image,
        patch_size=sizes.patch,
    )
    text = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    # Layer -1: neither library then runs a block that the other skips.
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=sizes.image_tokens,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    whole: Any = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    whole.save_pretrained(folder / "whole")
    whole.model.vision_tower.save_pretrained(folder / "vision")
    language: Any = transformers.LlamaForCausalLM(text).to(torch.bfloat16)
    language.model.load_state_dict(whole.model.language_model.state_dict())
    language.tie_weights()
    language.save_pretrained(folder / "language")
    save_file(whole.model.multi_modal_projector.state_dict(), folder / "connector.safetensors")
    words = {"<pad>": 0, "<image>": 1, "</s>": 2, "a": 3}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")),
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder / "language")
    return sum(parameter.numel() for parameter in whole.parameters())


def same_adapters(model: Any) -> int:
    """Fill every LoRA A by its place in the model, so that both sides go on from the same point."""
    import torch

    generator = torch.Generator().manual_seed(1)
    count = 0
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            values = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
            parameter.data.copy_(values)
            count += 1
    return count
