"""Streaming detokenisation: token ids to text, without incomplete characters or parts of a stop string."""

import codecs
from collections.abc import Sequence

from phi_c.text.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes the tokens of one sequence one by one.

    Text is withheld while its last bytes may be an incomplete character, or while its end may be the beginning of a
    stop string. The concatenated results of `push` and `finish` equal `tokenizer.decode` of all ids, cut before the
    first stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        special: bool = False,
        continues: bool = False,
    ) -> None:
        """Start with no text.

        stop: stop strings, none empty.
        special: include special tokens in the text.
        continues: the ids continue a sequence, so a space at the beginning is part of the text.
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_first_space and not continues
        self._withheld = ""
        self.text = ""  # all text returned so far
        self.stopped = False  # whether a stop string was found

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now complete; empty after a stop string."""
        raw = self._tokenizer.piece(token_id, special=self._special)
        if self._strip_space and raw:
            raw, self._strip_space = raw.removeprefix(b" "), False
        return self._emit(self._decoder.decode(raw), final=False)

    def finish(self) -> str:
        """Return the withheld text; an incomplete character becomes U+FFFD."""
        return self._emit(self._decoder.decode(b"", final=True), final=True)

    def _emit(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._withheld += text
        matches = [at for stop in self._stop if (at := self._withheld.find(stop)) >= 0]
        if matches:
            self.stopped = True
            complete, self._withheld = self._withheld[: min(matches)], ""
        else:
            cut = len(self._withheld) - (0 if final else self._possible_stop_length())
            complete, self._withheld = self._withheld[:cut], self._withheld[cut:]
        self.text += complete
        return complete

    def _possible_stop_length(self) -> int:
        """Return the length of the longest suffix of the withheld text that is a proper prefix of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for n in range(min(longest, len(self._withheld)), 0, -1):
            if any(stop.startswith(self._withheld[-n:]) for stop in self._stop):
                return n
        return 0
