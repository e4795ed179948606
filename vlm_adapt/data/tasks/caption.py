"""Captions, asked for in their language.

PaLI, arXiv:2209.06794, section 3.2 ("Generate the alt_text in ..."); PaliGemma, arXiv:2407.07726, section
3.2.5 ("caption {lang}"). Several captions of an image are references; one is drawn an epoch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from vlm_adapt.data.tasks.task import SETTINGS, Sizes, Task, Told, captions_in, carried


@dataclass(frozen=True, config=SETTINGS)
class Caption(Task):
    """{position} is 0: the caption from its beginning, in the words of `split_cap`."""

    name: ClassVar[str] = "caption"
    prompts: ClassVar[dict[str, str]] = {
        "pali": "Generate the alt_text in {lang} at {position}:",
        "paligemma": "caption {lang}",
    }
    fields: ClassVar[tuple[str, ...]] = ("position",)

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        captions = captions_in(record)
        if not captions:
            raise self.lacks(record, "a caption")
        return Told(carried(record) | {"captions": captions}, self.filled(record, position=0))
