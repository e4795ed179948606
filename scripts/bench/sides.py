"""The two sides of the training benchmark: vlm-adapt, and transformers' Trainer with peft.

Each is a process of its own that takes one optimizer step whenever its standard input says so, and
answers with a line of JSON. Knows how each side trains; knows nothing about tables.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from material import Row, Sizes, make_rows, same_adapters


class Line:
    """The pipe to the process that asks; measures CPU-seconds between two answers."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        self.before = 0.0  # the first step counts from the start of the process

    def answer(self, loss: float, useful: float) -> None:
        """Report the step just taken, wait until another is asked for, and start its clock.

        Args:
            useful: share of the batch's places that are no padding.
        """
        seconds = time.process_time() - self.before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = {"seconds": seconds, "loss": loss, "peak": peak, "useful": useful}
        print(json.dumps(told), file=self.out, flush=True)
        if not sys.stdin.readline():
            raise SystemExit(0)
        self.before = time.process_time()


def ours(folder: Path, sizes: Sizes, rows: list[Row], steps: int, options: dict[str, Any]) -> None:
    """models.build, the plan, the engine and collation: what `vlm-adapt train` does in a step.

    With `row_length` the step's samples share rows of as many tokens, filled as the data stream fills them.
    """
    line = Line()
    import torch

    torch.set_num_threads(1)
    from safetensors.torch import load_file

    from vlm_adapt.config.schema import Adapt, Model, Train
    from vlm_adapt.data.collate import collate
    from vlm_adapt.data.encode import Encoded
    from vlm_adapt.data.pack import fill
    from vlm_adapt.models.build import build
    from vlm_adapt.train.contract import Contract
    from vlm_adapt.train.engine import Engine

    model = Model.model_validate(
        {
            "vision": {"model": str(folder / "vision")},
            "language": {"model": str(folder / "language"), "attention": options["attention"]},
        }
    )
    assembled = build(model, torch.bfloat16)
    assembled.model.connector.load_state_dict(load_file(folder / "connector.safetensors"))
    plan = assembled.adapt(
        [
            [
                Adapt(method="full", where="connector"),
                Adapt(method="lora", where="language", r=sizes.rank, lora_alpha=2 * sizes.rank),  # type: ignore[call-arg]
            ]
        ]
    )
    same_adapters(assembled.model)
    train = Train(
        per_device_train_batch_size=sizes.batch, learning_rate=sizes.rate, deepspeed=options["deepspeed"]
    )
    groups = plan.groups(train.learning_rate)
    contract = Contract(assembled.model, [pair for _, _, pairs in groups for pair in pairs])
    engine = Engine(assembled.model, groups, train, torch.bfloat16)
    contract.start()
    image = sizes.image_tokens

    def encoded(row: Row) -> Encoded:
        length = image + len(row.text)
        places = np.arange(length)
        return Encoded(
            key="",
            ids=np.concatenate([np.zeros(image, np.int64), row.text]),
            blocks=places + 1,
            branches=np.zeros(length, np.int64),
            positions=places,
            predict_from=places[length - row.learned - 1 : -1],
            targets=row.text[-row.learned :],
            image_starts=np.array([0]),
            image_order=[0],
            image_lengths=[image],
            state_starts=np.zeros(0, np.int64),
            states=np.zeros((0, 0), np.float32),
            pixels=[row.pixels],
        )

    def packed(waiting: list[Encoded]) -> list[list[Encoded]]:
        filled = []
        while waiting:
            chosen = set(fill([len(text) for text in waiting], options["row_length"]))
            filled.append([text for place, text in enumerate(waiting) if place in chosen])
            waiting = [text for place, text in enumerate(waiting) if place not in chosen]
        return filled

    samples = [encoded(row) for row in rows]
    engine.module.train()
    for number in range(steps):
        chosen = samples[number * sizes.batch : (number + 1) * sizes.batch]
        texts = packed(chosen) if options.get("row_length") else [[text] for text in chosen]
        batch = collate(texts, **assembled.collate_options)
        learned = len(batch.targets_N)
        total, _ = engine.forward_backward(batch.to(engine.device), learned)
        engine.step(1.0, boundary=True)
        contract.after_step()
        line.answer(total / learned, batch.tokens / batch.ids_BT.numel())


def theirs(folder: Path, sizes: Sizes, rows: list[Row], steps: int, options: dict[str, Any]) -> None:
    """LlavaForConditionalGeneration in bf16, get_peft_model, Trainer(bf16=True, use_cpu=True)."""
    line, shares = Line(), [0.0]
    import torch

    torch.set_num_threads(1)
    import peft
    import transformers

    from vlm_adapt.image_spec import CLIP_MEAN, CLIP_STD

    attention = {} if options["attention"] == "auto" else {"attn_implementation": options["attention"]}
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder / "whole", dtype=torch.bfloat16, **attention
    )
    config = peft.LoraConfig(
        r=sizes.rank,
        lora_alpha=2 * sizes.rank,
        lora_dropout=0.0,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    model = peft.get_peft_model(model, config)
    same_adapters(model)
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (CLIP_MEAN, CLIP_STD))
    image = sizes.image_tokens

    class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = rows[index]
            ids = torch.cat([torch.ones(image, dtype=torch.long), torch.from_numpy(row.text)])
            labels = ids.clone()
            labels[: -row.learned] = -100
            return {"ids": ids, "labels": labels, "pixels": torch.from_numpy(row.pixels)}

    def collate(found: list[dict[str, Any]]) -> dict[str, Any]:
        padded = torch.nn.utils.rnn.pad_sequence
        ids = padded([one["ids"] for one in found], batch_first=True, padding_value=0)
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "labels": padded([one["labels"] for one in found], batch_first=True, padding_value=-100),
            "pixel_values": ((torch.stack([o["pixels"] for o in found]).float() - mean) / std).bfloat16(),
        }

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *arguments: Any, **more: Any) -> Any:
            shares[0] = float(arguments[1]["attention_mask"].float().mean())
            self.last = super().training_step(*arguments, **more)
            return self.last

    class Report(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            line.answer(float(trainer.last), shares[0])

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=sizes.batch,
        max_steps=steps,
        learning_rate=sizes.rate,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = InOrder(model, arguments, data_collator=collate, train_dataset=Samples(), callbacks=[Report()])
    trainer.train()


def main() -> None:
    """`sides.py NAME '{json of what to run}'`, called by training_step.py."""
    name, given = sys.argv[1], json.loads(sys.argv[2])
    sizes = Sizes(**given["sizes"])
    rows = make_rows(sizes, sizes.batch * given["steps"], given["variable"])
    {"ours": ours, "packed": ours, "theirs": theirs}[name](
        Path(given["folder"]), sizes, rows, given["steps"], given["options"][name]
    )


if __name__ == "__main__":
    main()
