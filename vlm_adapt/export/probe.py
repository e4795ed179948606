"""Logits of a few samples, to compare a model before and after a change.

Knows batches and logits; knows nothing about what was changed. The samples are a run's own where its shards
are there, else made up: noise for images and words drawn from the vocabulary, which is enough to tell two
models apart.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_adapt.config.schema import Run
from vlm_adapt.data.collate import collate
from vlm_adapt.data.encode import Encoded
from vlm_adapt.data.patches import load, tokens_of
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import Assembled

ROWS = 8
TOKENS = 64  # of each row, evenly spread: a vocabulary of 150,000 takes 0.6 MB a token
WORDS = 12  # of a made-up question or answer


class Probe:
    """Always the same samples, whatever model reads them.

    Args:
        run: whose shards are read: what is held out, else what is trained on.

    Attributes:
        source: `shards`, or `made up`.
    """

    def __init__(self, run: Run):
        self.run, self.source = run, "shards"

    def rows(self, assembled: Assembled) -> list[Encoded]:
        """Encoded texts with images, as this model wants them."""
        rows = self._read(assembled)
        if not rows:
            self.source = "made up"
            rows = [_made_up(assembled, number) for number in range(ROWS)]
        return rows[:ROWS]

    @torch.no_grad()
    def logits(self, assembled: Assembled) -> tuple[Tensor, Tensor]:
        """On the CPU in float32: (logits_NV of tokens, logits_MV of those that predict a learned one)."""
        model, options = assembled.model.eval(), assembled.collate_options
        device = next(model.parameters()).device
        every, learned = [], []
        for row in self.rows(assembled):
            batch = collate([row], **options).to(device)  # one at a time: no padding, little memory
            with torch.autocast(device.type, assembled.dtype, enabled=assembled.dtype != torch.float32):
                logits_NV = model.logits(batch).flatten(0, 1).float().cpu()
            every.append(logits_NV[:: -(-len(logits_NV) // TOKENS)].clone())
            predict_N = batch.predict_from_N.cpu()
            learned.append(logits_NV[predict_N[:: -(-len(predict_N) // TOKENS)]])
        return torch.cat(every), torch.cat(learned)

    def _read(self, assembled: Assembled) -> list[Encoded]:
        data = self.run.stage_runs()[-1][1].data
        for sources in (data.evaluate, data.train):
            try:
                reader = assembled.reader(sources, self.run.seed, data) if sources else None
            except (UserError, OSError):
                continue  # the shards are elsewhere: that is no error of a model
            rows: list[Encoded] = []
            for number in range(min(len(reader), 4 * ROWS) if reader is not None else 0):
                assert reader is not None
                try:
                    rows += reader.references(*reader.sample(number))[:1]
                except BadSample:
                    continue  # any other sample will do
                if len(rows) == ROWS:
                    break
            if rows:
                return rows
        return []


def _made_up(assembled: Assembled, number: int) -> Encoded:
    from PIL import Image

    generator = np.random.default_rng(number)
    ids = generator.integers(0, len(assembled.tokenizer), 2 * WORDS).tolist()
    words = [
        assembled.tokenizer.decode(some, skip_special_tokens=True) for some in (ids[WORDS:], ids[:WORDS])
    ]
    asked, said = (text.replace("<image>", "").strip() or "yes" for text in words)
    buffer = io.BytesIO()
    pixels = generator.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((256, 256)).save(buffer, "PNG")
    picture: Any = load(buffer.getvalue(), assembled.model.vision.image_spec)
    messages = [{"role": "user", "content": f"<image>{asked}"}, {"role": "assistant", "content": said}]
    sentence = assembled.template.conversation(messages)
    lengths = tokens_of([picture], assembled.encoder.tokens_per_image)
    row = assembled.encoder.encode(sentence, lengths, f"made up {number}")
    row.pixels = [picture]
    return row
