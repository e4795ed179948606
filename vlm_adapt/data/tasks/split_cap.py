"""Split captions: the beginning of a caption is shown, the rest is learned.

PaLI, arXiv:2209.06794, section 3.2, after SimVLM's prefix language modelling (arXiv:2108.10904): a caption
is cut at a random place into <cap1>, the end of the prompt, and <cap2>, the target. The paper's prompt has
a position that it does not explain; here it is the number of words in <cap1>.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from vlm_adapt.data.tasks.languages import units
from vlm_adapt.data.tasks.task import SETTINGS, Sizes, Task, Told, captions_in, carried


@dataclass(frozen=True, config=SETTINGS)
class SplitCap(Task):
    """The cut lies between two words, every place as likely; a caption of one word is learned whole.

    Languages without spaces are cut, and counted, in characters.
    """

    name: ClassVar[str] = "split_cap"
    prompts: ClassVar[dict[str, str]] = {
        "pali": "Generate the alt_text in {lang} at {position}: {start}",
        "paligemma": "caption {lang} {start}",
    }
    fields: ClassVar[tuple[str, ...]] = ("position", "start")
    required: ClassVar[tuple[str, ...]] = ("start",)

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        captions = captions_in(record)
        if not captions:
            raise self.lacks(record, "a caption")
        words = units(captions[int(generator.integers(len(captions)))], self.language_of(record))
        place = int(generator.integers(1, len(words))) if len(words) > 1 else 0
        prompt = self.filled(record, position=place, start="".join(words[:place]))
        return Told(carried(record) | {"question": prompt, "answer": "".join(words[place:]).strip()})
