"""From a Sentence to numbers: token ids, what is learned, who sees whom, where images sit.

Knows the tokenizer and how many tokens an image takes; knows nothing about tar files or models.
Every road (training, evaluation, chat) encodes here, one segment at a time, so that a prompt's ids
are a prefix of the ids of the same conversation with its answer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.token_masks import RowMasks
from vlm_adapt.sentence import Image, Sentence, State, Text, check_images

FILLER_ID = 0  # stands in `ids` where an image or state token will be spliced


@dataclass
class Encoded:
    """One row before collation; arrays of length T unless said otherwise.

    Attributes:
        ids: token ids, FILLER_ID under images and states.
        blocks: rises with every causal token; a token sees the tokens whose block is not above its own.
        branches: 0 for the shared prefix, 1, 2, … for branches.
        positions: from 0; each branch goes on after the prefix.
        predict_from: [N] index of the token (or decoder step) that predicts each target.
        targets: [N] ids to predict.
        image_starts: [I] where each image's tokens begin, in reading order.
        image_order: [I] which of the sample's images each is.
        image_lengths: [I] how many tokens each takes.
        state_starts: [S] where state tokens sit; `states` [S, F] their values.
        decoder_ids: [U] what the decoder reads; None for causal languages.
        cut: turns and branches left out because the row would be too long.
        prompt_tokens: so many places at the start are for learned vectors.
        masks: of the mask tokens that are learned.
    """

    key: str
    ids: np.ndarray
    blocks: np.ndarray
    branches: np.ndarray
    positions: np.ndarray
    predict_from: np.ndarray
    targets: np.ndarray
    image_starts: np.ndarray
    image_order: list[int]
    state_starts: np.ndarray
    states: np.ndarray
    decoder_ids: np.ndarray | None = None
    cut: int = 0
    image_lengths: list[int] = field(default_factory=list)
    pixels: list[Any] = field(default_factory=list)
    prompt_tokens: int = 0
    masks: RowMasks = field(default_factory=RowMasks)

    def __len__(self) -> int:
        return len(self.ids)

    def ends(self) -> list[int]:
        """The last token of every branch, or of the row when it has none: where answers would begin.

        For encoder-decoders the last of `decoder_ids`, which hold the answers so far.
        """
        if self.decoder_ids is not None:
            return [len(self.decoder_ids) - 1]
        last = {int(branch): place for place, branch in enumerate(self.branches)}
        return [last[branch] for branch in sorted(last) if branch > 0] or [len(self.ids) - 1]

    @property
    def plain(self) -> bool:
        """Whether this is one causal text without branches, which needs no mask."""
        return (
            not self.branches.any()
            and len(self.blocks) > 0
            and self.blocks[0] == 1
            and bool((np.diff(self.blocks) == 1).all())
        )


class Encoder:
    """Turns sentences into Encoded rows.

    Args:
        tokenizer: a transformers tokenizer.
        tokens_per_image: how many tokens the connector makes of an image.
        max_length: tokens a row may have.
        seq2seq: cut the sentence at its first learned segment: left to the encoder, right to the decoder.
        start_id: what opens the decoder.
        state_size: length of state vectors; 0 for none.
        prompt_tokens: places for learned vectors before everything else, the beginning-of-text token
            included: so peft has them. Every branch sees them; nothing is learned from them.
        mask_token: the id of the token that asks for a mask; None for a model without.
    """

    def __init__(
        self,
        tokenizer: Any,
        tokens_per_image: int,
        max_length: int,
        seq2seq: bool = False,
        start_id: int = 0,
        state_size: int = 0,
        prompt_tokens: int = 0,
        mask_token: int | None = None,
    ):
        self.prompt_tokens, self.mask_token = prompt_tokens, mask_token
        self.tokenizer, self.tokens_per_image, self.max_length = tokenizer, tokens_per_image, max_length
        self.seq2seq, self.start_id, self.state_size = seq2seq, start_id, state_size
        begin = tokenizer.bos_token_id
        opened = tokenizer("a").input_ids
        self.begin_id = begin if begin is not None and opened and opened[0] == begin else None
        self._tokens = lru_cache(maxsize=65536)(self._tokenize)

    def twin(self) -> Encoder:
        """The same with a tokenizer of its own, for another thread: tokenizers bear one at a time."""
        return Encoder(
            copy.deepcopy(self.tokenizer),
            self.tokens_per_image,
            self.max_length,
            self.seq2seq,
            self.start_id,
            self.state_size,
            self.prompt_tokens,
            self.mask_token,
        )

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def encode(
        self, sentence: Sentence, images: int | Sequence[int], key: str, learn: bool = True
    ) -> Encoded:
        """Encode one sentence.

        Args:
            images: how many images the sample carries, or how many tokens each of them takes.
            key: the sample's key, for messages and the account.
            learn: whether something must be learned (training), or a prompt is enough.

        Raises:
            UserError: placeholders and images disagree (both numbers are named).
            BadSample: one turn alone is too long, or nothing is learned.
        """
        lengths = [self.tokens_per_image] * images if isinstance(images, int) else list(images)
        check_images(sentence, len(lengths), key)
        row, cut = self._write(sentence, lengths, learn), 0
        while row.length() > self.max_length:
            shorter = self._shorter(sentence)
            if shorter is None:
                raise BadSample(
                    "one turn alone is too long", f"{row.length()} tokens, max_length {self.max_length}"
                )
            sentence, cut = shorter, cut + 1
            row = self._write(sentence, lengths, learn)
        if learn and not row.targets:
            raise BadSample("nothing in it is learned: it has no answer")
        return row.finish(key, cut, self.state_size)

    @staticmethod
    def _shorter(sentence: Sentence) -> Sentence | None:
        """The sentence without its last branch or turn; images leave only with the turn they are in."""
        last_branch = max((segment.branch for segment in sentence), default=0)
        if last_branch > 1:
            return Sentence(tuple(s for s in sentence if s.branch < last_branch))
        return sentence.first_turns(sentence.turns - 1) if sentence.turns > 1 else None

    def _write(self, sentence: Sentence, lengths: Sequence[int], learn: bool) -> _Row:
        row = _Row()
        row.masks.asked = not learn
        segments: Sequence[Any] = sentence.segments
        prompt = len(segments)
        if self.seq2seq:
            prompt = next((i for i, s in enumerate(segments) if isinstance(s, Text) and s.learned), prompt)
        first_causal = segments[0].causal if segments else True
        row.open(self.prompt_tokens, first_causal)
        if self.begin_id is not None and not _opens_with(segments, self.tokenizer.bos_token):
            row.add([self.begin_id], 0, first_causal, learned=False)
        for segment in segments[:prompt]:
            if isinstance(segment, Text):
                tokens = self._tokens(segment.text)
                if segment.learned:
                    row.masks.note(tokens, len(row.ids), self.mask_token, segment.masks, learn)
                row.add(tokens, segment.branch, segment.causal, segment.learned)
            elif isinstance(segment, Image):
                row.image_starts.append(len(row.ids))
                row.image_order.append(segment.index)
                row.image_lengths.append(lengths[segment.index])
                row.add([FILLER_ID] * lengths[segment.index], segment.branch, segment.causal, False)
            elif isinstance(segment, State):
                if len(segment.values) != self.state_size:
                    numbers = f"{len(segment.values)} numbers, model.state_size is {self.state_size}"
                    raise BadSample("its state vector has another length", numbers)
                row.state_starts.append(len(row.ids))
                row.states.append(segment.values)
                row.add([FILLER_ID], segment.branch, segment.causal, False)
        if self.seq2seq:
            if self.tokenizer.eos_token_id is not None:
                row.add([self.tokenizer.eos_token_id], 0, False, learned=False)
            row.decoder_ids = [self.start_id]
            for segment in segments[prompt:]:
                if not isinstance(segment, Text):
                    raise BadSample(
                        "an image after the first answer, where an encoder-decoder reads text only"
                    )
                tokens = self._tokens(segment.text)
                if segment.learned:
                    first = len(row.decoder_ids) - 1
                    row.predict_from += range(first, first + len(tokens))
                    row.targets += tokens
                row.decoder_ids += tokens
            if segments[prompt:] and segments[-1].learned:
                row.decoder_ids.pop()  # it predicts nothing; a prompt's last token does
        return row


class _Row:
    """Lists that grow while a sentence is written."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.blocks: list[int] = []
        self.branches: list[int] = []
        self.positions: list[int] = []
        self.predict_from: list[int] = []
        self.targets: list[int] = []
        self.image_starts: list[int] = []
        self.image_order: list[int] = []
        self.image_lengths: list[int] = []
        self.state_starts: list[int] = []
        self.states: list[Sequence[float]] = []
        self.decoder_ids: list[int] | None = None
        self.block = 0
        self.last_of: dict[int, int] = {}  # last token of every branch, which predicts the next
        self.prompt_tokens = 0
        self.masks = RowMasks()

    def open(self, prompt_tokens: int, causal: bool) -> None:
        """Begin with places for learned vectors, which predict nothing: as much is learned without them."""
        self.add([FILLER_ID] * prompt_tokens, 0, causal, learned=False)
        self.prompt_tokens = prompt_tokens

    def add(self, tokens: Sequence[int], branch: int, causal: bool, learned: bool) -> None:
        for token in tokens:
            here = len(self.ids)
            previous = self.last_of.get(branch, self.last_of.get(0))
            if learned and previous is not None and previous >= self.prompt_tokens:
                self.predict_from.append(previous)
                self.targets.append(token)
            self.block += causal
            self.ids.append(token)
            self.blocks.append(self.block)
            self.branches.append(branch)
            self.positions.append(0 if previous is None else self.positions[previous] + 1)
            self.last_of[branch] = here

    def length(self) -> int:
        """Tokens of the row, or of the decoder's where that is longer."""
        return max(len(self.ids), len(self.decoder_ids or ()))

    def finish(self, key: str, cut: int, state_size: int) -> Encoded:
        whole = np.int64
        return Encoded(
            key=key,
            ids=np.array(self.ids, whole),
            blocks=np.array(self.blocks, whole),
            branches=np.array(self.branches, whole),
            positions=np.array(self.positions, whole),
            predict_from=np.array(self.predict_from, whole),
            targets=np.array(self.targets, whole),
            image_starts=np.array(self.image_starts, whole),
            image_order=self.image_order,
            image_lengths=self.image_lengths,
            state_starts=np.array(self.state_starts, whole),
            states=np.array(self.states, np.float32).reshape(len(self.states), state_size),
            decoder_ids=None if self.decoder_ids is None else np.array(self.decoder_ids, whole),
            cut=cut,
            prompt_tokens=self.prompt_tokens,
            masks=self.masks,
        )


def _opens_with(segments: Sequence[Any], token: str | None) -> bool:
    return bool(segments and token and isinstance(segments[0], Text) and segments[0].text.startswith(token))
