"""From messages to batches and back, for tests of floors 1 and 2: short ways along the one road."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny


def assemble(
    vision: Path, language: Path, connector: str = "mlp", state_size: int = 0, **settings: Any
) -> Any:
    """Our own build() of two folders; `layers` goes to the tower, the rest to the language."""
    import torch

    from vlm_adapt.config.schema import Model
    from vlm_adapt.models.build import build

    layers = settings.pop("layers", [-1])
    tree = {
        "vision": {"model": str(vision), "layers": layers},
        "connector": {"name": connector},
        "language": {"model": str(language), **settings},
        "state_size": state_size,
    }
    return build(Model.model_validate(tree), torch.float32)


def chat(*contents: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": content}
        for number, content in enumerate(contents)
    ]


def row(assembled: Any, sentence: Any, seed: int = 0, learn: bool = True) -> Any:
    """A sentence encoded, with as many random pictures as it shows."""
    import torch

    height, width = assembled.model.vision.image_spec.size
    images = sentence.image_count
    encoded = assembled.encoder.encode(sentence, images, f"s{seed}", learn=learn)
    generator = torch.Generator().manual_seed(seed)
    shape = (images, 3, height, width)
    encoded.pixels = list(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).numpy())
    return encoded


def conversation(assembled: Any, *contents: str, seed: int = 0, learn: bool = True) -> Any:
    """A conversation encoded, with random pictures."""
    return row(assembled, assembled.template.conversation(chat(*contents)), seed, learn)


def batch(assembled: Any, rows: Sequence[Any], **more: Any) -> Any:
    """Rows collated for the model."""
    from vlm_adapt.data.collate import collate

    return collate(rows, **assembled.collate_options, **more)


def labels(collated: Any) -> Any:
    """The library's labels of a causal batch: the target after each predicting position, else -100."""
    import torch

    made = torch.full(collated.ids_BT.shape, -100).flatten()
    made[collated.predict_from_N + 1] = collated.targets_N
    return made.view_as(collated.ids_BT)


def written(template: Any, messages: list[dict[str, str]]) -> str:
    """A conversation as the one string that the model reads."""
    from vlm_adapt.sentence import IMAGE_PLACEHOLDER, Text

    pieces = [s.text if isinstance(s, Text) else IMAGE_PLACEHOLDER for s in template.conversation(messages)]
    return "".join(pieces)


def words(generator: np.random.Generator, count: int) -> str:
    """Some words of the tiny tokenizer."""
    return " ".join(generator.choice(tiny.WORDS.split(), count))
