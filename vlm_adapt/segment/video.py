"""Videos through the program `ffmpeg`, if there is one: raw frames in, raw frames out, none kept.

Knows the program and its pipes; knows nothing about masks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image as PILImage

from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

USUAL = Fraction(25)
# Rates as ffmpeg rounds them, and as they are.
RATES = {"23.98": "24000/1001", "29.97": "30000/1001", "59.94": "60000/1001", "119.88": "120000/1001"}


@dataclass(frozen=True)
class About:
    """A video's frames a second and, where the file says it, their number."""

    rate: Fraction
    frames: int | None


def program() -> str:
    """Where ffmpeg is. Raises UserError: nowhere."""
    found = shutil.which("ffmpeg")
    if found is None:
        raise UserError(
            "a video is read by the program 'ffmpeg', which is not on the PATH: install it, or give a folder "
            "of frames, or an animated GIF or WebP"
        )
    return found


def _file(path: Path) -> str:
    return f"file:{path.absolute()}"  # a name may begin with a dash, or look like an address


def probe(path: Path) -> About:
    """What a video says of itself. Raises BadSample: there is no video in the file."""
    command = [program(), "-hide_banner", "-nostdin", "-protocol_whitelist", "file", "-i", _file(path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    text = done.stderr
    if not re.search(r"Stream #.*Video:", text):
        last = text.strip().splitlines()[-1:] or ["it says nothing"]
        raise BadSample("no video that ffmpeg can read", last[0].replace(str(path), path.name))
    found = re.search(r"([\d.]+) fps", text)
    rate = Fraction(RATES.get(found[1], found[1])) if found and float(found[1]) > 0 else USUAL
    time = re.search(r"Duration: (\d+):(\d+):([\d.]+)", text)
    frames = None
    if time:
        frames = round((int(time[1]) * 3600 + int(time[2]) * 60 + float(time[3])) * rate)
    return About(rate, frames or None)


def read_video(path: Path, rate: Fraction, max_pixels: int, notes: list[str]) -> Iterator[np.ndarray]:
    """pixels_HWC uint8 of every frame at a constant rate, upright.

    Args:
        notes: takes what ffmpeg complains of in a video that it reads all the same.

    Raises:
        BadSample: damaged from its beginning, or too large.
    """
    command = [program(), "-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe", "-i", _file(path)]
    command += ["-map", "0:v:0", "-r", str(rate), "-f", "image2pipe", "-c:v", "ppm", "-"]
    with _running(command, stdout=subprocess.PIPE) as (process, told):
        count = 0
        while (pixels_HWC := _frame(process.stdout, max_pixels)) is not None:
            count += 1
            yield pixels_HWC
        process.wait()
        if not count:
            raise BadSample("damaged video", told() or "it has no frames")
        if told():
            notes.append(f"damaged: {count:,} frames could be read (ffmpeg: {told()})")


def _frame(pipe: IO[bytes] | None, max_pixels: int) -> np.ndarray | None:
    """The next frame of a stream of PPM pictures; None at its end, whole or not."""
    assert pipe is not None
    if pipe.readline().strip() != b"P6":
        return None
    width, height = map(int, pipe.readline().split())
    pipe.readline()  # the largest value, 255
    if width * height > max_pixels:
        raise BadSample("image too large", f"frames of {width:,} x {height:,} pixels")
    data = pipe.read(3 * width * height)
    if len(data) < 3 * width * height:
        return None
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def write_video(path: Path, frames: Iterator[tuple[PILImage.Image, float]], rate: Fraction) -> None:
    """Write an MP4 of pictures of one size, whole or not at all.

    Raises:
        UserError: ffmpeg cannot write it; and whatever `frames` raises.
    """
    part = path.with_name(f".{path.stem}.part.mp4")
    first, _ = next(frames)
    size = (first.width + first.width % 2, first.height + first.height % 2)  # what the usual coding demands
    command = [program(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{size[0]}x{size[1]}", "-r", str(rate), "-i", "-"]
    command += ["-pix_fmt", "yuv420p", "-movflags", "+faststart", _file(part)]
    try:
        with _running(command, stdin=subprocess.PIPE) as (process, told):
            assert process.stdin is not None
            try:
                process.stdin.write(_even(first, size))
                for picture, _ in frames:
                    process.stdin.write(_even(picture, size))
                process.stdin.close()
            except BrokenPipeError:
                pass  # ffmpeg has ended, and says why
            if process.wait():
                raise UserError(f"'{path}' cannot be written: {told() or 'ffmpeg does not say why'}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _even(picture: PILImage.Image, size: tuple[int, int]) -> bytes:
    if picture.size != size:
        page = PILImage.new("RGB", size, (255, 255, 255))
        page.paste(picture, (0, 0))
        picture = page
    return picture.tobytes()


@contextmanager
def _running(command: list[str], **pipes: Any) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """A process that does not outlive the block, and a function that gives the last line it complained with.

    It is no part of the terminal's group: Ctrl-C comes to us, and we end it.
    """
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stderr=complaints, start_new_session=True, **pipes)

        def told() -> str:
            complaints.seek(0)
            lines = complaints.read().decode("utf-8", "replace").strip().splitlines()
            return next((line for line in lines if "No space left" in line), lines[-1] if lines else "")

        try:
            yield process, told
        finally:
            if process.poll() is None:
                process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        pass  # what was not yet written is for nobody
            process.wait()
