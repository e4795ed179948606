"""Adapters folded into the weights they change, with a receipt that nothing else did.

Knows checkpoints, dtypes and tolerances; the folding itself is in fold.py. What was folded in float32 is
written in the dtype asked for, read back, and compared with the unmerged model in that very dtype.

    FOLDER/
        language/, vision/  in their libraries' own formats; only parts that were changed
        run.yaml            names them by ${folder}, so that the folder can be moved
        connector-full/     the connector; beside it what cannot be folded (prompts, prefixes, …)
        receipt.json        what was compared, on how many tokens, and the largest differences
        state.json, adapter.json, tokenizer/    as of any adapter: chat, evaluate and train take the folder
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlm_adapt import dist
from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError
from vlm_adapt.export.fold import FOLDED, Merge, split
from vlm_adapt.export.folder import check_target, whole_folder
from vlm_adapt.export.probe import Probe
from vlm_adapt.models.build import compute_dtype
from vlm_adapt.models.restore import find_checkpoint, read_checkpoint, restore

RECEIPT = "receipt.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# As shares of the largest logit: every merged weight is rounded anew (bfloat16 keeps 1 part in 256, float16
# 1 in 2048), and so are a layer's sums.
TOLERANCES = {"float32": FOLDED, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class Receipt:
    """What a merge changed.

    Attributes:
        largest_difference: of any logit before and after, both in the saved dtype.
        tolerance: what it may be at most; `share` of `largest_logit`, or three times `rounding` if that is
            more and no tolerance was asked for.
        rounding: what the dtype alone does to a logit of the unmerged model, against float32.
        folding_difference: the same in float32, before anything was rounded.
        tokens: over how many tokens; `samples` says whose.
        argmax_differs: tokens whose likeliest word is another one.
        effect: the largest difference that the adapter makes to its base's logits.
        folded, kept: labels of what is in the weights now, and of what lies on top.
        parts: what was written of the tower and of the language.
    """

    dtype: str
    largest_difference: float
    tolerance: float
    share: float
    largest_logit: float
    rounding: float
    folding_difference: float
    tokens: int
    samples: str
    argmax_differs: int
    effect: float
    folded: list[str]
    kept: list[str]
    parts: dict[str, str]


def merge_checkpoint(
    checkpoint: str | Path, target: Path, dtype: str | None = None, tolerance: float | None = None
) -> Receipt:
    """Fold every method that can be into the base, and write a model that chat, evaluate and train take.

    Args:
        dtype: of what is written: float32, bfloat16 or float16; by default what the run computes in.
        tolerance: the largest difference allowed, as a share of the largest logit.

    Raises:
        UserError: nothing can be folded, the adapter does nothing, the difference is too large, or the folder
            cannot be written. Nothing is left there then.
    """
    check_target(target)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype '{dtype}' is none of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    folder = find_checkpoint(checkpoint)
    run, state = read_checkpoint(folder)
    kind = DTYPES[dtype] if dtype else compute_dtype(run.train.bf16)
    name = str(kind).removeprefix("torch.")
    folded, kept = split(folder, run, state)
    probe = Probe(run)
    with whole_folder(target) as temporary:
        merged = Merge(folder, run, folded, kept, probe)
        parts = merged.write(temporary, state, kind)
        folding = merged.folding_difference
        effect, float32_NV = merged.effect, merged.before_NV
        del merged
        before_NV = _logits(folder, kind, probe)
        after_NV = _logits(temporary, kind, probe)
        largest = float(before_NV.abs().max())
        rounding = float((before_NV - float32_NV).abs().max())
        share = TOLERANCES[name] if tolerance is None else tolerance
        receipt = Receipt(
            dtype=name,
            largest_difference=float((before_NV - after_NV).abs().max()),
            tolerance=max(share * largest, 3 * rounding if tolerance is None else 0.0),
            rounding=rounding,
            share=share,
            largest_logit=largest,
            folding_difference=folding,
            tokens=len(before_NV),
            samples=probe.source,
            argmax_differs=int((before_NV.argmax(-1) != after_NV.argmax(-1)).sum()),
            effect=effect,
            folded=[label for _, label in folded],
            kept=[label for _, label in kept],
            parts=parts,
        )
        if not receipt.largest_difference <= receipt.tolerance:
            raise UserError(
                f"the merged model in {name} differs from the unmerged by {receipt.largest_difference:.3g} "
                f"in a logit (the largest is {largest:.3g}), more than the {receipt.tolerance:.3g} allowed, "
                f"and {receipt.argmax_differs} of {receipt.tokens} likeliest words changed: nothing was "
                "written; try --dtype float32, or allow more with --tolerance"
            )
        (temporary / RECEIPT).write_text(json.dumps(asdict(receipt), indent=1), encoding="utf-8")
    return receipt


def _logits(folder: Path, kind: torch.dtype, probe: Probe) -> Tensor:
    assembled, _, _ = restore(folder, kind)
    assembled.model.to(dist.device())
    return probe.logits(assembled)[0]
