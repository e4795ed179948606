"""One sample as the model sees it, in words: its files, record, images, and every row of tokens.

Knows a Feed and rich's Text; knows nothing about how a row is encoded.
"""

from __future__ import annotations

import bisect
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from vlm_adapt.data.encode import Encoded
from vlm_adapt.data.images import image_size
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.sample import parse_sample
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.errors import UserError
from vlm_adapt.report.feed import Feed, described
from vlm_adapt.report.tokens import Part, Piece, parts

LONGEST = 1 << 30  # a max_length that cuts nothing
NEIGHBOURS = 2000  # keys, in the order of the alphabet, among which the nearest is looked for
LEARNED, FAINT, HEAD, ALARM = "bold green", "dim", "bold", "bold red"


def find(shards: ShardSet, word: str) -> list[int]:
    """Numbers of the samples with this key (several only if shards repeat a key), or of `#17`.

    Raises:
        UserError: there is none; the nearest key is named.
    """
    if word.startswith("#") and word[1:].isdigit():
        if int(word[1:]) >= shards.samples:
            raise UserError(f"there is no sample {word}: they are numbered from #0 to #{shards.samples - 1}")
        return [int(word[1:])]
    keys = [index.key(place) for index in shards.indexes for place in range(len(index))]
    found = [number for number, key in enumerate(keys) if key == word]
    if found:
        return found
    lost = [problem for problem in shards.problems if problem.key == word]
    if lost:
        raise UserError(f"sample '{word}' cannot be read: {lost[0].reason} (in {lost[0].shard})")
    ranked = sorted(set(keys))
    place = bisect.bisect(ranked, word)
    near = difflib.get_close_matches(
        word, ranked[max(0, place - NEIGHBOURS) : place + NEIGHBOURS], n=1, cutoff=0.0
    )
    hint = f", the nearest is '{near[0]}'" if near else ""
    raise UserError(f"no sample has the key '{word}'{hint}: give a key, or '#17' for the 18th sample")


@dataclass(frozen=True)
class Marks:
    """How a learned token is told: by colour on a terminal, by marks elsewhere."""

    colour: bool = False

    def token(self, piece: Piece) -> Text:
        """A piece with its id."""
        if piece.id is None:
            return Text(piece.text, HEAD)
        text = Text().append(piece.text, LEARNED if piece.learned else "")
        text.append(f"·{piece.id}", FAINT)
        return text if self.colour or not piece.learned else Text("«") + text + Text("»")


def show(feed: Feed, number: int, epoch: int = 0, colour: bool = False) -> Iterator[Text]:
    """Lines that tell all about a sample; a refused one is told so, and shown as far as it can be."""
    reader, marks = feed.reader, Marks(colour)
    source, local = reader.locate(number)
    ref = reader.sets[source].ref(local)
    yield Text(f"{ref.key}  (#{number} of {len(reader):,}, {ref.shard})", HEAD)
    yield Text(f"read as {described(feed)}, epoch {epoch}")
    yield Text("members: " + ", ".join(f"{name} {size:,} bytes" for name, _, size in ref.members))
    try:
        sample = parse_sample(*reader.sets[source].read(local))
    except BadSample as error:
        yield Text(f"REFUSED: {error}", ALARM)
        return
    yield Text(json.dumps(sample.record, indent=2, ensure_ascii=False))
    account = Account()
    rows = reader.training(number, epoch, number, account)
    whole = _uncut(feed, number, epoch)
    yield from _images(feed, number, rows or whole)
    for reason in account.refused:
        yield Text(f"REFUSED: {reason}: {', '.join(account.examples.get(reason, []))}", ALARM)
    if not rows and whole:
        yield Text("it would be read so, if it were not refused:", ALARM)
    for place, row in enumerate(rows or whole):
        yield Text("")
        yield from _row(feed, row, f"row {place + 1} of {len(rows or whole)}", marks)
        if row.cut:
            yield from _cut(feed, row, whole[place] if len(whole) == len(rows) else None, marks)
    yield Text("")
    yield from _footing(feed, rows, colour)


def _uncut(feed: Feed, number: int, epoch: int) -> list[Encoded]:
    """The same rows as if there were no limit to their length: what is left out comes after the rest."""
    encoder = feed.reader.encoder
    limit, encoder.max_length = encoder.max_length, LONGEST
    try:
        return feed.reader.training(number, epoch, number, Account())
    finally:
        encoder.max_length = limit


def _images(feed: Feed, number: int, rows: list[Encoded]) -> Iterator[Text]:
    try:
        sample, _ = feed.reader.sample(number)
    except BadSample:
        return
    tokens: dict[int, int] = {}
    for row in rows:
        tokens |= dict(zip(row.image_order, row.image_lengths, strict=True))
    for place, data in enumerate(sample.images):
        line = f"image {place}: {len(data):,} bytes"
        try:
            width, height = image_size(data, feed.reader.max_pixels)
            line = f"image {place}: {width} x {height} in the file"
        except BadSample as error:
            line += f", {error}"
        if rows and place < len(rows[0].pixels):
            line += f" -> {_for_tower(rows[0].pixels[place], feed.reader.image_spec.resize)}"
        yield Text(f"{line}, {tokens.get(place, 0)} tokens")


def _for_tower(pixels: Any, resize: str) -> str:
    """Of an image as the tower gets it: patches of its own aspect, or pixels_CHW."""
    if hasattr(pixels, "grid"):
        return f"{pixels.grid[1]} x {pixels.grid[0]} patches for the tower (own aspect)"
    return f"{pixels.shape[2]} x {pixels.shape[1]} for the tower ({resize})"


def _row(feed: Feed, row: Encoded, name: str, marks: Marks) -> Iterator[Text]:
    shown = sum(row.image_lengths)
    text = len(row) - shown - row.prompt_tokens
    counts = f"{len(row)} tokens: {text} of text, {shown} of {len(row.image_lengths)} image(s)"
    if row.prompt_tokens:
        counts += f", {row.prompt_tokens} places of learned vectors"
    if row.decoder_ids is not None:
        counts += f"; {len(row.decoder_ids)} in the decoder"
    yield Text(f"{name}: {counts}; {len(row.targets)} learned", HEAD)
    for part in parts(row, feed.assembled.tokenizer):
        yield from _part(part, bool(row.branches.any()), marks)


def _part(part: Part, branched: bool, marks: Marks) -> Iterator[Text]:
    where = f"positions {part.first} to {part.last}" if part.last > part.first else f"position {part.first}"
    what = {
        "causal": "read in order",
        "both ways": "read both ways: each sees all of them",
        "decoder": "the decoder reads in order",
    }
    name = f"branch {part.branch}, " if part.branch else "prefix of all branches, " if branched else ""
    yield Text(f"  {name}{where}, {part.tokens} tokens, {what[part.how]}, {part.learned} learned", FAINT)
    line = Text("    ")
    for piece in part.pieces:
        line.append(marks.token(piece)).append(" ")
        if piece.text.endswith("\\n"):  # a line of the text is a line here
            line.rstrip()
            yield line
            line = Text("    ")
    if len(line) > 4:
        line.rstrip()
        yield line


def _cut(feed: Feed, row: Encoded, whole: Encoded | None, marks: Marks) -> Iterator[Text]:
    limit = feed.reader.encoder.max_length
    yield Text(f"  CUT: {row.cut} turns or questions left out, max_length is {limit}", ALARM)
    same = whole is not None and len(whole) > len(row) and bool((whole.ids[: len(row)] == row.ids).all())
    if whole is not None and same and row.decoder_ids is None:
        yield Text(f"  left out, {len(whole) - len(row)} tokens:", FAINT)
        for part in parts(whole, feed.assembled.tokenizer, start=len(row)):
            yield from _part(part, bool(whole.branches.any()), marks)


def _footing(feed: Feed, rows: list[Encoded], colour: bool) -> Iterator[Text]:
    total, learned = sum(map(len, rows)), sum(len(row.targets) for row in rows)
    limit = feed.reader.encoder.max_length
    yield Text(f"in all: {len(rows)} row(s), {total} tokens of at most {limit} a row, {learned} learned")
    how = Text("learned", LEARNED) if colour else Text("«learned»")
    yield Text("each token is text·id; ") + how + Text("; ␣ is a space")


def printed(lines: Iterator[Text], console: Any) -> None:
    """Print lines, broken at spaces where they are too long."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=not console.is_terminal)
