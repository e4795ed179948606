"""The verb `vlm-adapt scores`: how hard each training sample is, written into a sidecar.

Knows arguments, exit codes and wording; knows nothing of how anything is done (see cli/__init__.py).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlm_adapt import dist
from vlm_adapt.cli.common import checked_run, checkpoint_folder, counting
from vlm_adapt.errors import UserError

PICTURES = (".png", ".svg", ".pdf")


def scores(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT | KEY=VALUE",
            help="A checkpoint folder or a run's output_dir (its best); of several, the mean is taken. "
            "Overrides as in data.workers=0.",
        ),
    ],
    shards: Annotated[
        list[str] | None, typer.Option(help="Score these, not the run's data.train; may be repeated.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file; CHECKPOINT/scores.safetensors if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many samples, to look at.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples at once.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw a histogram with the easiest and hardest samples.")
    ] = None,
    by: Annotated[str, typer.Option(help="What the picture goes by: el2n, grand, loss.")] = "el2n",
) -> None:
    """Score training samples by EL2N and gradient norm, for data pruning (source setting `keep`)."""
    dist.follow_launcher()
    overrides = [word for word in words if re.match(r"[\w.]+=", word) and not Path(word).exists()]
    checkpoints = [Path(word) for word in words if word not in overrides]
    if not checkpoints:
        raise UserError("scores needs a checkpoint: a checkpoint folder, or a run's output_dir")
    if picture is not None and picture.suffix not in PICTURES:
        raise UserError(f"a picture ends in {', '.join(PICTURES)}, and '{picture}' does not")
    if by not in ("el2n", "grand", "loss"):
        raise UserError(f"--by '{by}' is not one of el2n, grand, loss")
    folders = [checkpoint_folder(path) for path in checkpoints]
    checked_run(folders[0] / "run.yaml", overrides, train=not shards, evaluate=False)
    from vlm_adapt.evaluate.scoring import score_checkpoints

    scored, target = score_checkpoints(folders, overrides, shards or (), output, limit, batch_size, counting)
    if not dist.is_main():
        return
    for name, line in scored.summary().items():
        print(f"{name:<7}{line}")
    done = f"{scored.count:,} of {len(scored.looked_at):,} samples scored"
    account = scored.account
    if account.truncated or account.refusals:
        done += f"; {account.truncated:,} truncated" + (", counted by each checkpoint" if folders[1:] else "")
    print(done + (f"; refused {account.named()}" if account.refusals else ""))
    if picture is not None:
        from vlm_adapt.report.difficulty import draw

        draw(scored.reader, scored.scores[by], by, picture)
        print(f"drawn in {picture}", file=sys.stderr)
    print(f"written to {target}", file=sys.stderr)
