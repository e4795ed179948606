"""A conversation with a trained model: questions and images in, text out piece by piece.

Knows the model and its history; knows nothing about terminals. A session takes training's road:
template, encoder, collate, splice, language.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from vlm_adapt import dist
from vlm_adapt.chat.history import History, Turn
from vlm_adapt.chat.masks import ReplyMask, read_pixels
from vlm_adapt.chat.words import Words
from vlm_adapt.data.collate import collate
from vlm_adapt.data.encode import Encoded
from vlm_adapt.data.images import MAX_PIXELS
from vlm_adapt.data.patches import load
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.language.language import Generation
from vlm_adapt.models.adapters import Adapters
from vlm_adapt.models.build import Assembled
from vlm_adapt.models.mask_answer import Watch, at_size
from vlm_adapt.models.restore import find_checkpoint, read_checkpoint, restore


@dataclass(frozen=True)
class Speed:
    """How a reply went: tokens written, seconds until the first one, and seconds in all."""

    tokens: int
    first: float
    seconds: float

    def __str__(self) -> str:
        after = self.seconds - self.first
        rate = f", then {(self.tokens - 1) / after:.1f} tokens/s" if self.tokens > 1 and after > 0 else ""
        return f"{self.tokens} tokens, the first after {self.first:.2f} s{rate}"


class Session:
    """A model, its conversation so far, and how to write.

    Args:
        assembled: the model with its tokenizer, template and encoder.
        system: the system message; None is the run's, or else the template's own.
        settings: length, temperature, top_p and seed of replies.
        max_pixels: larger images are refused.
        adapters: of which `assembled` is the model, to switch among them.

    Attributes:
        notes: what the user should know about the last question (turns that no longer fit, a reply
            that was cut); read them after the reply.
        speed: of the last reply.
        masks: that the last reply carries, in the order of its tokens; read them after the reply.
    """

    def __init__(
        self,
        assembled: Assembled,
        system: str | None = None,
        settings: Generation | None = None,
        max_pixels: int = MAX_PIXELS,
        adapters: Adapters | None = None,
    ):
        self.adapters = adapters
        self.assembled, self.max_pixels = assembled, max_pixels
        self.settings = settings or Generation(max_new_tokens=256)
        self.device = dist.device()
        assembled.model.to(self.device).eval()
        system = assembled.config.language.system if system is None else system
        self.history = History(assembled.template, assembled.encoder, system)
        self.notes: list[str] = []
        self.speed: Speed | None = None
        self.masks: list[ReplyMask] = []
        self._told_single = False

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        system: str | None = None,
        settings: Generation | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> Session:
        """A session with the model of a checkpoint, of a run's folder or of an adapter.

        Args:
            adapters: further ones by name; the last is in use.

        Raises:
            UserError: it cannot be restored, or an adapter belongs to another base.
        """
        if adapters:
            several = Adapters.open(checkpoint)
            for name, folder in adapters.items():
                several.add(name, folder)
            several.use(several.names[-1:])
            run, _ = read_checkpoint(find_checkpoint(checkpoint))
            return cls(several.assembled, system, settings, run.data.max_pixels, several)
        assembled, run, _ = restore(checkpoint)
        return cls(assembled, system, settings, run.data.max_pixels)

    def use(self, names: Sequence[str]) -> None:
        """Let these adapters answer from now on, the base for none; the conversation stays.

        Raises:
            UserError: no adapters were given, an unknown name, or some that cannot act together.
        """
        if self.adapters is None:
            raise UserError(
                "there are no adapters to switch: start with chat CHECKPOINT --adapter NAME=FOLDER"
            )
        self.adapters.use(names)
        self.history.encoder = self.assembled.encoder
        self.notes = list(self.adapters.notes)

    def load_image(self, file: str | Path, spec: ImageSpec | None = None) -> Any:
        """An image file as the tower wants it: uint8 [C, H, W], or patches of an image of native size.

        Args:
            spec: another tower's; None is that of the tower whose images the language reads.

        Raises:
            UserError: it is missing, not an image, damaged, or too large.
        """
        path = Path(file).expanduser()
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"there is no image '{file}'") from error
        except OSError as error:
            raise UserError(f"the image '{file}' cannot be read: {error.strerror}") from error
        try:
            return load(data, spec or self.assembled.model.vision.image_spec, self.max_pixels)
        except BadSample as error:
            raise UserError(f"'{file}' cannot be shown to the model: {error}") from error

    def ask(self, text: str, images: Sequence[str | Path] = ()) -> Iterator[str]:
        """Ask something; images go before the text unless it says `<image>` where they stand.

        Returns:
            the reply in pieces. The history holds what of it was read: all, or the part before the
            iterator was closed or interrupted.

        Raises:
            UserError: an image cannot be used, or placeholders and images differ. The conversation stays
                as it was.
        """
        self.notes, self.speed, self.masks = [], None, []
        pixels = [self.load_image(image) for image in images]
        spec = self.assembled.masks
        scenes = [self.load_image(image, spec.image_spec) for image in images] if spec and spec.own else []
        names = [str(Path(image).expanduser().resolve()) for image in images]
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # odd bytes of a terminal
        history, single = self.history, self.assembled.encoder.seq2seq
        turn = history.ask(text, pixels, names, scenes)
        try:
            row, dropped = history.prompt(self.settings.max_new_tokens)
        except UserError:
            history.turns.remove(turn)
            raise
        if dropped:
            self.notes.append(
                f"the conversation has outgrown its {history.limit} tokens: the model no longer sees its "
                f"{dropped} oldest turn(s)" + (f", {history.first} in all" if history.first > dropped else "")
            )
        if single and history.first and not self._told_single:
            self._told_single = True
            self.notes.append(
                "this encoder-decoder reads one turn at a time: this question and the last images"
            )
        return self._reply(turn, row)

    def _reply(self, turn: Turn, row: Encoded) -> Iterator[str]:
        """Generate in a thread, so that text comes out as it is written and can be stopped."""
        assembled, device = self.assembled, self.device
        batch = collate([row], **assembled.collate_options).to(device)
        room = self.settings.max_new_tokens
        if not assembled.encoder.seq2seq:
            room = min(room, self.history.limit - len(row))
        tokens: SimpleQueue[int | BaseException | None] = SimpleQueue()
        stop, ended = threading.Event(), threading.Event()

        def on_token(ids: list[int | None]) -> None:
            if stop.is_set():
                raise _Stopped
            if ids[0] is None:
                ended.set()
            else:
                tokens.put(ids[0])

        seed = self.settings.seed
        seed = None if seed is None else seed + len(self.history.turns) - 1
        watch = None if assembled.masks is None else Watch(assembled.model, batch)
        settings = replace(self.settings, max_new_tokens=room, seed=seed, on_token=on_token, on_states=watch)

        def write() -> None:
            try:
                with self._autocast():
                    assembled.model.generate(batch, settings, assembled.stop_ids)
            except _Stopped:
                pass
            except BaseException as error:  # raised again where the reply is read
                tokens.put(error)
            finally:
                tokens.put(None)

        words = Words(assembled.tokenizer, assembled.template.answer_start, self._stop_text())
        thread = threading.Thread(target=write, daemon=True)
        started = time.perf_counter()
        first = last = 0.0
        complete = False
        thread.start()
        try:
            while (item := tokens.get()) is not None and not words.stopped:
                if isinstance(item, BaseException):
                    raise item
                last = time.perf_counter() - started
                first = first or last
                if piece := words.add(item):
                    yield piece
            if piece := words.finish():
                yield piece
            complete = True
        finally:
            stop.set()
            thread.join()
            turn.answer = words.text
            self.speed = Speed(len(words.ids), first, last)
            if not complete and not words.text:
                self.history.turns.remove(turn)  # nothing was said: as if never asked
        if not ended.is_set() and not words.stopped:
            reason = (
                "model.language.max_length" if room < self.settings.max_new_tokens else "the length asked for"
            )
            self.notes.append(f"the reply was cut after {room} tokens ({reason})")
        if watch is not None:
            self._draw(watch, words.ids)

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = self.assembled.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _draw(self, watch: Watch, tokens: list[int]) -> None:
        """The masks that a reply's tokens ask for, at the size of the last image shown."""
        with self._autocast():
            (drawn,) = watch.masks([tokens])
        image, spec = self.history.last_image(), self.assembled.masks
        if not drawn or spec is None:
            return
        if image is None:
            self.notes.append("the reply asks for a mask, and there is no image to draw it on")
            return
        height, width = read_pixels(image, self.max_pixels).shape[:2]
        self.masks = [
            ReplyMask(image, at_size(one, spec.image_spec, height, width)) for one in drawn if one is not None
        ]

    def _stop_text(self) -> str:
        """What ends a turn where no single token does."""
        end = self.assembled.template.end
        if not end.strip():
            return ""
        tokens = self.assembled.tokenizer.encode(end, add_special_tokens=False)
        return end if len(tokens) > 1 else ""

    def reset(self) -> None:
        """Forget the conversation; the system message and the settings stay."""
        self.history = History(self.assembled.template, self.assembled.encoder, self.history.system)
        self.notes, self.speed, self.masks = [], None, []

    def transcript(self) -> dict[str, Any]:
        """The whole conversation as `shards write llava` reads a sample: messages and image files."""
        return {"id": "chat", "images": self.history.images(), "messages": self.history.messages()}


class _Stopped(BaseException):
    """Ends a generation from within; not an Exception, so that no library swallows it."""
