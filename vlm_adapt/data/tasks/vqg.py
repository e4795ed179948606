"""Visual question generation: the answer is shown, the question is learned.

PaLI, arXiv:2209.06794, section 3.2; PaliGemma, arXiv:2407.07726 ("question {lang} {English answer}"). Of
several answers the commonest is shown. `lang` is the question's language.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from vlm_adapt.data.tasks.task import SETTINGS, Sizes, Task, Told, carried, fixed, questions_in


@dataclass(frozen=True, config=SETTINGS)
class Vqg(Task):
    """Every question of a sample from its answer; in evaluation, those of one answer are references."""

    name: ClassVar[str] = "vqg"
    prompts: ClassVar[dict[str, str]] = {
        "pali": "Generate a question in {lang} for {answer}:",
        "paligemma": "question {lang} {answer}",
    }
    fields: ClassVar[tuple[str, ...]] = ("answer",)
    required: ClassVar[tuple[str, ...]] = ("answer",)

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        questions = questions_in(record)
        if not questions:
            raise self.lacks(record, "a question with an answer")
        asked = []
        for entry in questions:
            answer = Counter(entry["answers"]).most_common(1)[0][0]
            prompt = self.filled(record, answer=answer)
            asked.append(entry | {"question": prompt, "answers": [entry["question"]]})
        return Told(carried(record) | {"questions": asked})

    def evaluation(self, record: dict[str, Any], sizes: Sizes = ()) -> Told:
        told = self.training(record, fixed(record))
        merged: dict[str, dict[str, Any]] = {}
        for entry in told.record["questions"]:
            first = merged.setdefault(entry["question"], entry | {"answers": []})
            first["answers"] += entry["answers"]
        return Told(told.record | {"questions": list(merged.values())})
