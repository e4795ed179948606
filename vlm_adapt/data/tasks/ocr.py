"""The text in an image, as one string in reading order.

PaLI, arXiv:2209.06794, section 3.2 ("Generate the ocr_text in {lang}:"); PaliGemma, arXiv:2407.07726: all
texts in raster order, where too many are there random ones are left out, so that the beginning is not
favoured.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm_adapt.data.tasks.task import SETTINGS, Sizes, Task, Told, carried


@dataclass(frozen=True, config=SETTINGS)
class Ocr(Task):
    """The texts of `ocr`, joined.

    Attributes:
        separator: between two texts.
        most_texts: of more texts than this, so many are drawn in training, and stay in order; evaluation
            asks for all.
    """

    separator: str = " "
    most_texts: int | None = Field(default=None, gt=0)

    name: ClassVar[str] = "ocr"
    prompts: ClassVar[dict[str, str]] = {"pali": "Generate the ocr_text in {lang}:", "paligemma": "ocr"}

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        texts = self._texts(record)
        if self.most_texts is not None and len(texts) > self.most_texts:
            kept = generator.choice(len(texts), self.most_texts, replace=False)
            texts = [texts[place] for place in sorted(kept.tolist())]
        return self._told(record, texts)

    def evaluation(self, record: dict[str, Any], sizes: Sizes = ()) -> Told:
        return self._told(record, self._texts(record))

    def _texts(self, record: dict[str, Any]) -> list[str]:
        if not record.get("ocr"):
            raise self.lacks(record, "ocr with a text")
        return [entry["text"].strip() for entry in record["ocr"]]

    def _told(self, record: dict[str, Any], texts: list[str]) -> Told:
        told = {"question": self.filled(record), "answer": self.separator.join(texts)}
        return Told(carried(record) | told)
