"""Token ids to text while they are still coming.

Knows that a character may take several tokens and that a tokenizer may drop a leading space; knows
nothing about models.
"""

from __future__ import annotations

from typing import Any

UNFINISHED = "\ufffd"  # what decoders write for bytes that are not yet a character
PATIENCE = 8  # tokens to wait for the rest of a character (which has at most 4 bytes)


class Words:
    """Text of a growing reply.

    Tokens are decoded together with those of the piece before, since alone they may lose a leading
    space (SentencePiece), and are held back while they end inside a character.

    Args:
        lead: dropped from the beginning (the space that a template writes before an answer).
        stop: text that ends the reply, where it is more than one token.
    """

    def __init__(self, tokenizer: Any, lead: str = "", stop: str = ""):
        self.tokenizer, self.lead, self.stop = tokenizer, lead, stop
        self.ids: list[int] = []
        self.text = ""  # everything handed out so far
        self.stopped = False
        self._raw = ""  # everything decoded so far
        self._window, self._decoded = 0, 0

    def add(self, token: int) -> str:
        """One more token; the text that is now certain, often none."""
        self.ids.append(token)
        pending = len(self.ids) - self._decoded
        return self._decode(wait=pending < PATIENCE)

    def finish(self) -> str:
        """The text that was still held back."""
        self._decode(wait=False)
        return self._hand_out(len(self._shown()))

    def _decode(self, wait: bool) -> str:
        before = self._text_of(self.ids[self._window : self._decoded])
        now = self._text_of(self.ids[self._window :])
        if wait and now.endswith(UNFINISHED):
            return ""
        self._raw += now[len(before) :]
        self._window, self._decoded = self._decoded, len(self.ids)
        shown = self._shown()
        held = 0
        if self.stop and not self.stopped:  # its beginning may already stand at the end
            held = next((n for n in range(len(self.stop) - 1, 0, -1) if shown.endswith(self.stop[:n])), 0)
        if len(self._raw) < len(self.lead) and self.lead.startswith(self._raw):
            return ""
        return self._hand_out(len(shown) - held)

    def _shown(self) -> str:
        shown = self._raw.removeprefix(self.lead)
        if self.stop and self.stop in shown:
            self.stopped = True
            return shown[: shown.index(self.stop)]
        return shown

    def _hand_out(self, length: int) -> str:
        new = self._shown()[len(self.text) : length]
        self.text += new
        return new

    def _text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
