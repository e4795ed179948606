"""A model of a checkpoint over images, folders, animations and videos, one frame at a time.

Knows the order of things; how a model finds masks is its kind's, how files look is output.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from vlm_adapt import dist
from vlm_adapt.data.images import MAX_PIXELS, decode
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.report.colours import colours
from vlm_adapt.report.regions import overlay
from vlm_adapt.report.segmentation import write_file, write_png
from vlm_adapt.segment.animation import animated, read_frames
from vlm_adapt.segment.ask import Ask
from vlm_adapt.segment.inputs import Input, read
from vlm_adapt.segment.kinds import KINDS
from vlm_adapt.segment.opened import config_of, load, locate
from vlm_adapt.segment.output import Film, folder_for, mask_png, scores_file
from vlm_adapt.segment.result import Segmentation
from vlm_adapt.segment.video import probe, program, read_video, write_video


@dataclass
class Done:
    """One input that is finished: its files, and what was found in it (of a film, its mean over frames)."""

    source: Input
    size: tuple[int, int]
    frames: int
    rows: list[dict[str, Any]]
    files: dict[str, str]
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A line of `--json`."""
        about = {"image": str(self.source.path), "width": self.size[0], "height": self.size[1]}
        about |= {"frames": self.frames} if self.source.kind != "image" else {}
        return about | self.files | {"labels": self.rows, "seconds": round(self.seconds, 3)} | self.figures


class Finder:
    """A checkpoint's model, asked for masks.

    Args:
        checkpoint: a checkpoint folder, a run's output folder, or an untrained model (see opened.py).

    Raises:
        UserError: no checkpoint, a model that finds no masks, or one that cannot be asked this.
    """

    def __init__(self, checkpoint: str | Path, ask: Ask):
        folder = locate(checkpoint)
        config = config_of(folder)
        kind = config.kind
        if kind not in KINDS:
            words = "answers in words (ask it with chat)" if kind == "vision_language" else f"is a {kind}"
            raise UserError(
                f"'{folder}' holds a model that {words}: segment needs one of kind {' or '.join(KINDS)}"
            )
        made = KINDS.load(kind)
        made.check(ask, config)
        assembled, max_pixels = load(folder)
        self.device, self.dtype = dist.device(), assembled.dtype
        assembled.model.to(self.device).eval()
        self.kind, self.max_pixels = made(assembled, ask), max_pixels or MAX_PIXELS

    @torch.no_grad()
    def __call__(self, pixels_HWC: np.ndarray) -> Segmentation:
        """The masks of an image. Raises BadSample: it cannot be done."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found: Segmentation = self.kind(pixels_HWC)
        return found


@dataclass
class Segment:
    """Inputs to files, in turn.

    Args:
        find: pixels to masks, as Finder does.
        output: folder of the results. opacity: of the colours, 0 to 1.
        tell: called with frames done and frames in all, where that is known.
        scores: also the chances of every label.
        points, boxes: what was asked, to be drawn into the picture.
    """

    find: Callable[[np.ndarray], Segmentation]
    output: Path
    opacity: float = 0.55
    tell: Callable[[int, int | None], None] = lambda done, total: None
    scores: bool = False
    max_pixels: int = MAX_PIXELS
    points: Sequence[tuple[float, float, int]] = ()
    boxes: Sequence[tuple[float, float, float, float]] = ()
    account: Account = field(default_factory=Account)

    def run(self, inputs: list[Input]) -> Iterator[Done]:
        """Each input that could be done; the others are in the account, by the reason.

        Raises:
            UserError: results cannot be written, or there is no ffmpeg for a video.
        """
        if any(one.kind == "video" for one in inputs):
            program()
        self.done, self.inputs = 0, list(inputs)
        for place, one in enumerate(inputs):
            started = time.monotonic()
            try:
                if one.kind == "image":
                    made = self._image(one)
                else:
                    made = self._film(place)
            except BadSample as error:
                self.account.refuse(str(one.path), error)
                self.inputs[place] = replace(self.inputs[place], frames=0)
                continue
            made.seconds = time.monotonic() - started
            self.account.use()
            yield made

    def _tick(self) -> None:
        self.done += 1
        frames = [one.frames for one in self.inputs]
        self.tell(self.done, None if None in frames else sum(one or 0 for one in frames))

    def _image(self, one: Input) -> Done:
        pixels_HWC = decode(read(one.path, self.max_pixels), self.max_pixels)
        found = self.find(pixels_HWC)
        palette = colours(found.names)
        mask, picture, chances = (
            folder_for(self.output / f"{one.name}-{what}")
            for what in ("mask.png", "overlay.png", "scores.safetensors")
        )
        files = {"mask": str(mask), "overlay": str(picture)}
        write_file(mask, mask_png(found, palette))
        shares = found.shares if found.listed else None
        shown = (pixels_HWC, found.classes_HW, found.names, palette, shares, self.opacity)
        write_png(picture, overlay(*shown, self.points, self.boxes))
        if found.scores_LHW is not None:
            write_file(chances, scores_file(found))
            files["scores"] = str(chances)
        self._tick()
        size = (pixels_HWC.shape[1], pixels_HWC.shape[0])
        return Done(one, size, 1, found.rows(), files, 0.0, dict(found.figures))

    def _film(self, place: int) -> Done:
        """Masks as numbered files, and one film of overlays."""
        one = self.inputs[place]
        if self.scores:
            raise BadSample("no scores of films (they would be thousands of large files): leave out --scores")
        rate = Fraction(1)
        if one.kind == "video":
            about = probe(one.path)
            rate = about.rate
            one = self.inputs[place] = replace(one, frames=about.frames)
        frames = _Frames(self, one, rate)
        target = folder_for(self.output / f"{one.name}-overlay.{'mp4' if one.kind == 'video' else 'webp'}")
        if one.kind == "video":
            write_video(target, iter(frames), rate)
        else:
            write_file(target, animated(iter(frames), one.frames or 1))
        files = {"masks": str(frames.folder), "overlay": str(target)}
        figures = {"notes": frames.notes} if frames.notes else {}
        return Done(one, frames.size, frames.count, frames.rows(), files, 0.0, figures)


class _Frames:
    """The frames of a film as overlays; their masks are written on the way."""

    def __init__(self, segment: Segment, source: Input, rate: Fraction):
        self.segment, self.source, self.rate = segment, source, rate
        self.folder = segment.output / f"{source.name}-masks"
        self.size, self.count = (0, 0), 0
        self.notes: list[str] = []
        self.shares: dict[str, float] = {}
        self.scores: dict[str, list[float]] = {}

    def __iter__(self) -> Iterator[tuple[PILImage.Image, float]]:
        path, most = self.source.path, self.segment.max_pixels
        film = Film(self.segment.opacity)
        frames: Iterator[tuple[np.ndarray, float]]
        if self.source.kind == "video":
            frames = ((one, float(1 / self.rate)) for one in read_video(path, self.rate, most, self.notes))
        else:
            frames = read_frames(path, most)
        for pixels_HWC, seconds in frames:
            found = self.segment.find(pixels_HWC)
            palette = colours(found.names)
            write_file(folder_for(self.folder / f"{self.count:06d}.png"), mask_png(found, palette))
            self.size = (pixels_HWC.shape[1], pixels_HWC.shape[0])
            self.count += 1
            for row in found.rows():
                self.shares[row["label"]] = self.shares.get(row["label"], 0.0) + row["share"]
                if row["score"] is not None:
                    self.scores.setdefault(row["label"], []).append(row["score"])
            self.segment._tick()
            yield film.picture(pixels_HWC, found, palette), seconds

    def rows(self) -> list[dict[str, Any]]:
        """Shares and scores, averaged over frames (scores over those that have the label)."""
        ordered = sorted(self.shares, key=lambda name: -self.shares[name])
        means = {name: sum(found) / len(found) for name, found in self.scores.items()}
        return [
            {"label": name, "share": self.shares[name] / self.count, "score": means.get(name)}
            for name in ordered
        ]
