"""Questions, with the language of the answer before them.

PaLI, arXiv:2209.06794, section 3.2 ("Answer in {lang}: ..."); PaliGemma, arXiv:2407.07726 ("answer {lang}
{question}"). Both ask in many languages and answer in English: `lang` is the answer's language, so set it
in the configuration where a sample's own `lang` is that of the question.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from vlm_adapt.data.tasks.task import SETTINGS, Sizes, Task, Told, carried, questions_in


@dataclass(frozen=True, config=SETTINGS)
class Vqa(Task):
    """Every question of a sample, in the prompt's words."""

    name: ClassVar[str] = "vqa"
    prompts: ClassVar[dict[str, str]] = {
        "pali": "Answer in {lang}: {question}",
        "paligemma": "answer {lang} {question}",
    }
    fields: ClassVar[tuple[str, ...]] = ("question",)
    required: ClassVar[tuple[str, ...]] = ("question",)

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        questions = questions_in(record)
        if not questions:
            raise self.lacks(record, "a question with an answer")
        asked = [entry | {"question": self.filled(record, question=entry["question"])} for entry in questions]
        return Told(carried(record) | {"questions": asked})
