"""Ids to text as they come: never half a character, never a part of a stop string."""

import codecs
from collections.abc import Sequence

from phi_c.text.tokenizer import Tokenizer


class StreamDecoder:
    """Turns ids into text piece by piece.

    Text is held back while its last bytes may be half a character, or while its end may be the beginning of a
    stop string; the pieces and `finish` together are `tokenizer.decode` of the ids, cut before the first stop string.
    continues: text precedes, so a first space belongs to the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        special: bool = False,
        continues: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_first_space and not continues
        self._held = ""
        self.text = ""  # all that was given out
        self.stopped = False  # a stop string was met

    def push(self, token_id: int) -> str:
        """Return the text that is certain now; nothing after a stop string."""
        raw = self._tokenizer.piece(token_id, special=self._special)
        if self._strip_space and raw:
            raw, self._strip_space = raw.removeprefix(b" "), False
        return self._emit(self._decoder.decode(raw), final=False)

    def finish(self) -> str:
        """Return what was held back; an incomplete character becomes U+FFFD."""
        return self._emit(self._decoder.decode(b"", final=True), final=True)

    def _emit(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else self._possible_start()
            cut = len(self._held) - keep
            certain, self._held = self._held[:cut], self._held[cut:]
        self.text += certain
        return certain

    def _possible_start(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stop):
                return n
        return 0
