"""The verb `zero-shot`: a segmenter on classes that its training left out, by the published protocols.

Knows episodes, their counts and where results go; layouts and draws are data/episodes' (PASCAL-5i, COCO-20i,
FSS-1000). As LSeg (Li et al. 2022, arXiv 2201.03546) counts: of an episode's labels, "others" and its class,
the likelier one is each pixel's; image and mask are squashed to a square of 480 first, the mask by nearest
neighbours; intersections and unions are summed per class over all episodes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_adapt import __version__, dist
from vlm_adapt.config.load import load_run
from vlm_adapt.config.schema import Evaluate
from vlm_adapt.data.episodes.protocol import Episode, Protocol
from vlm_adapt.data.images import resize
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.scores import spread
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.metrics.segment import EpisodeCounts
from vlm_adapt.models.dense_inference import DenseInference
from vlm_adapt.models.locate import find_checkpoint
from vlm_adapt.models.restore import restore_any

OTHER = "others"
SIDE = 480  # pixels of the square in which published figures are counted
FILE = "zero_shot.json"
Tell = Callable[[int], None]
Counting = Callable[[str, int], AbstractContextManager[Tell]]


@dataclass
class ZeroShot:
    """What was found: `metrics` for the file, and the counts that they come from."""

    metrics: dict[str, Any]
    counts: EpisodeCounts
    classes: tuple[str, ...]

    def table(self) -> str:
        """A line a class, then the means."""
        from vlm_adapt.report.tables import plain_table

        rows: list[dict[str, Any]] = [
            {"class": name, "IoU %": _percent(iou), "episodes": int(episodes)}
            for name, iou, episodes in zip(
                self.classes, self.counts.iou_C, self.counts.episodes_C, strict=True
            )
            if episodes
        ]
        total = int(self.counts.episodes_C.sum())
        rows.append({"class": "mIoU", "IoU %": _percent(self.counts.miou()), "episodes": total})
        rows.append({"class": "FB-IoU", "IoU %": _percent(self.counts.fb_iou()), "episodes": total})
        return plain_table(rows, right=("IoU %",))


@contextmanager
def _silent(what: str, total: int) -> Iterator[Tell]:
    yield lambda done: None


def zero_shot_checkpoint(
    path: str | Path,
    protocol: Protocol,
    limit: int | None = None,
    side: int | None = SIDE,
    output: Path | None = None,
    counting: Counting = _silent,
) -> tuple[ZeroShot, Path]:
    """Score a checkpoint by a protocol that is open, and write `zero_shot.json`.

    Args:
        path: a checkpoint folder or a run's output folder.
        limit: only so many episodes, spread evenly; the figures are no published ones then.
        side: of the square; None judges at the images' own size, with the run's evaluate.window, scales and
            flip.
        output: the folder; by default `zero_shot/PROTOCOL-FOLD` in the checkpoint's.
        counting: `counting(what, episodes)` opens a progress display, which is told how many are done.

    Raises:
        UserError: no checkpoint, no segmenter, or a file of the protocol that is missing.
    """
    dist.start()
    episodes = protocol.episodes()
    protocol.check_files(episodes)
    folder = find_checkpoint(path)
    run = load_run(folder / "run.yaml", ())
    if run.model.kind != "segmenter":
        raise UserError(f"zero-shot needs a segmenter, and '{path}' holds a model of kind {run.model.kind}")
    assembled, _, _ = restore_any(folder)
    device = dist.device()
    assembled.model.to(device).eval()

    @contextmanager
    def autocast() -> Iterator[None]:
        with torch.autocast(device.type, assembled.dtype, enabled=assembled.dtype != torch.float32):
            yield

    total = len(set(episodes))
    with (counting if dist.is_main() else _silent)(protocol.title, total) as tell:
        found = zero_shot(assembled.model, protocol, run.evaluate, limit, side, autocast, tell)
    target = output or folder / "zero_shot" / f"{protocol.name}-{protocol.fold}"
    if dist.is_main():
        found.metrics |= {"checkpoint": str(folder), "version": __version__}
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found.metrics, indent=1, ensure_ascii=False)
        (target / FILE).write_text(text, encoding="utf-8")
    return found, target / FILE


def zero_shot(
    segmenter: Any,
    protocol: Protocol,
    settings: Evaluate | None = None,
    limit: int | None = None,
    side: int | None = SIDE,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    tell: Tell = lambda done: None,
) -> ZeroShot:
    """Score a segmenter by a protocol that is open; episodes are dealt over ranks. As `zero_shot_checkpoint`.

    Raises:
        UserError: not one episode could be used.
    """
    all_episodes = protocol.episodes()
    episodes = [all_episodes[place] for place in spread(len(all_episodes), limit)]
    settings = settings or Evaluate()
    inference = (
        DenseInference(segmenter, window="whole")
        if side is not None
        else DenseInference(
            segmenter, settings.window, settings.scales, settings.flip, base_size=settings.base_size
        )
    )
    classes = protocol.unseen()
    counts, account = EpisodeCounts(len(classes)), Account()
    # The same question is asked once, and its answer counted as often as it comes.
    distinct = list(Counter(episodes).items())
    mine = distinct[dist.rank() :: dist.world_size()]
    for done, (episode, times) in enumerate(mine, start=1):
        _count(protocol, inference, classes, episode, times, side, autocast, counts, account)
        tell(min(len(distinct), done * dist.world_size()))
    merged, accounts = EpisodeCounts(len(classes)), Account()
    for part, words in dist.gather((counts, account.to_dict())):
        merged.merge(part)
        accounts.merge(Account.from_dict(words))
    if not merged.episodes_C.any():
        raise UserError(f"none of {len(episodes)} episodes could be used: {accounts.named()}")
    complete = protocol.as_published(episodes) and not accounts.refused and side == SIDE
    metrics: dict[str, Any] = {
        "protocol": protocol.name,
        "fold": protocol.fold,
        "miou": _known(merged.miou()),
        "fb_iou": _known(merged.fb_iou()),
        "per_class": {
            name: {"iou": _known(float(iou)), "episodes": int(number)}
            for name, iou, number in zip(classes, merged.iou_C, merged.episodes_C, strict=True)
            if number
        },
        "absent": [name for name, one in zip(classes, merged.episodes_C, strict=True) if not one],
        "episodes": int(merged.episodes_C.sum()),
        "episodes_in_all": len(all_episodes),
        "as_published": complete,
        "labels": [OTHER, "the class"],
        "names": protocol.names,
        "side": side,
        "list": str(protocol.list_file),
        "account": accounts.to_dict(),
    }
    return ZeroShot(metrics, merged, classes)


def _count(
    protocol: Protocol,
    inference: DenseInference,
    classes: tuple[str, ...],
    episode: Episode,
    times: int,
    side: int | None,
    autocast: Callable[[], AbstractContextManager[None]],
    counts: EpisodeCounts,
    account: Account,
) -> None:
    """Ask one episode's question, and count the answer."""
    name = classes[episode.number]
    try:
        pixels_HWC, truth_HW = protocol.read(episode, alike=side is None)
    except BadSample as error:
        account.refuse(f"{episode.image} ({name})", error)
        return
    account.use()
    if side is not None:
        square = ImageSpec((side, side), resize="squash", interpolation="bilinear")
        pixels_HWC = np.ascontiguousarray(resize(pixels_HWC, square).transpose(1, 2, 0))
        truth_HW = nearest_square(truth_HW, side)
    with autocast():
        classes_HW, _ = inference.classes(pixels_HWC, (OTHER, name))
    counts.add(episode.number, classes_HW, truth_HW, times)


def nearest_square(mask_HW: np.ndarray, side: int) -> np.ndarray:
    """A mask squashed to a square by torch's `nearest`, whose places are rounded down in float32."""
    rows, columns = (
        np.minimum(np.arange(side, dtype=np.float32) * np.float32(length / side), length - 1).astype(int)
        for length in mask_HW.shape
    )
    return mask_HW[rows[:, None], columns[None, :]]


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
