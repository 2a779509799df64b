"""The tokenizer: text to token ids and back."""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import Metaspace

from phi_c.errors import ModelFileError, OptionError, UnsupportedModelError
from phi_c.text.backend import SPACE, build_backend, load_backend
from phi_c.text.vocabulary import BYTE, UNUSED, USER_DEFINED, Vocabulary, read_vocabulary

REPLACEMENT = "\ufffd"

# Characters that special tokens with lstrip or rstrip absorb: Unicode's White_Space, as in the `tokenizers` library.
# str.strip would also remove the separators U+001C to U+001F.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def load_tokenizer(
    metadata: Mapping[str, Any], tokenizer_json: Path | None = None, path: Path | None = None
) -> "Tokenizer":
    """Return the tokenizer of a GGUF file.

    metadata: of the GGUF file.
    tokenizer_json: path of a tokenizer.json to build it from; None: build it from the GGUF file's vocabulary.
    path: of the GGUF file, for error messages.

    Raises ModelFileError for a corrupt vocabulary or a tokenizer.json of another model, UnsupportedModelError for a
    kind of tokenizer that phi-c does not support.
    """
    try:
        vocabulary = read_vocabulary(metadata)
        if tokenizer_json is None:
            return Tokenizer(vocabulary, build_backend(vocabulary))
    except (ModelFileError, UnsupportedModelError) as error:
        if path is None:
            raise
        raise type(error)(f"{path}: {error}") from None
    backend, vocabulary = load_backend(tokenizer_json, vocabulary)
    return Tokenizer(vocabulary, backend)


class Tokenizer:
    """Encodes text to token ids and decodes token ids to text. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary, backend: Backend) -> None:
        self.vocabulary = vocabulary
        self._backend = backend
        self._special_ids = {vocabulary.tokens[i]: i for i in vocabulary.special}
        self.special_pattern: re.Pattern[str] | None = vocabulary.special_pattern()

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary. The model's embedding may have more rows."""
        return len(self.vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a sequence (BOS); None: the model has none."""
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The end-of-sequence token (EOS) of the file; None: the file names none."""
        return self.vocabulary.eos_id

    @property
    def add_bos(self) -> bool:
        """Whether sequences of this model begin with `bos_id`."""
        return self.vocabulary.add_bos

    @property
    def eog_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""
        return self.vocabulary.eog_ids

    def is_special(self, token_id: int) -> bool:
        """Return whether a token is special: encoded only with parse_special, and omitted from decoded text."""
        return token_id in self.vocabulary.special

    def token(self, token_id: int) -> str:
        """Return the vocabulary's entry for an id, unchanged."""
        self._check(token_id)
        return self.vocabulary.tokens[token_id]

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Return the token ids of a text.

        add_bos: begin with exactly one BOS token; None: as the model file specifies.
        parse_special: encode special tokens in the text, such as `<|end|>`, as such; False: as plain text.

        Raises OptionError if text is not a str.
        """
        if not isinstance(text, str):
            raise OptionError(f"text is a {type(text).__name__}, expected a str")
        pattern = self.special_pattern if parse_special else None
        return self.with_bos(self.encode_with_special(text, pattern.finditer(text) if pattern else ()), add_bos)

    def encode_with_special(self, text: str, specials: Iterable[re.Match[str]]) -> list[int]:
        """Return the token ids of a text in which only the given matches of `special_pattern` are special tokens.

        specials: in ascending order. No BOS is added.
        """
        ids: list[int] = []
        start, strip = 0, False
        for match in specials:
            token_id = self._special_ids[match[0]]
            plain = text[start : match.start()]
            if token_id in self.vocabulary.lstrip:
                plain = plain.rstrip(_WHITE_SPACE)
            self._encode_plain(plain, strip, ids)
            ids.append(token_id)
            start, strip = match.end(), token_id in self.vocabulary.rstrip
        self._encode_plain(text[start:], strip, ids)
        return ids

    @cached_property
    def _backend_after_special(self) -> Backend:
        """The pipeline for text after a special token: Metaspace's "first" adds no space there."""
        step = self._backend.pre_tokenizer
        if not isinstance(step, Metaspace) or step.prepend_scheme != "first":
            return self._backend
        backend = Backend.from_str(self._backend.to_str())
        backend.pre_tokenizer = Metaspace(step.replacement, "never", step.split)
        return backend

    def with_bos(self, ids: list[int], add_bos: bool | None = None) -> list[int]:
        """Return the ids with exactly one BOS in front.

        add_bos: False: return the ids unchanged; None: as the model file specifies.
        """
        wanted = self.add_bos if add_bos is None else add_bos
        if not wanted or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def _encode_plain(self, text: str, strip: bool, ids: list[int]) -> None:
        if strip:
            text = text.lstrip(_WHITE_SPACE)
        if text:
            # Lone surrogates cannot be encoded in UTF-8; they become question marks.
            clean = text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text
            backend = self._backend_after_special if ids else self._backend
            ids.extend(backend.encode(clean, add_special_tokens=False).ids)

    def piece(self, token_id: int, *, special: bool = False) -> bytes:
        """Return the bytes of a token (token_to_piece in llama.cpp). They may end within a UTF-8 character.

        special: return the names of special tokens; False: no bytes for them, except for `vocabulary.visible`.

        Raises OptionError for an id outside the vocabulary.
        """
        self._check(token_id)
        token, kind = self.vocabulary.tokens[token_id], self.vocabulary.kinds[token_id]
        if token_id in self.vocabulary.special or kind == UNUSED:
            return token.encode() if special or token_id in self.vocabulary.visible else b""
        if kind == USER_DEFINED:
            return token.encode()
        if self.vocabulary.model == "llama":
            if kind == BYTE:
                return _byte_of(token)
            return token.replace(SPACE, " ").encode()
        # A character outside the table occurs only in a corrupt vocabulary; its UTF-8 bytes are used.
        return b"".join(self._bytes_of_characters.get(c, c.encode()) for c in token)

    @cached_property
    def _bytes_of_characters(self) -> dict[str, bytes]:
        """GPT-2's table of byte-level BPE: printable bytes map to themselves, the others to U+0100 and following."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in printable]
        table = {chr(b): bytes([b]) for b in printable}
        return table | {chr(0x100 + i): bytes([b]) for i, b in enumerate(others)}

    @property
    def strips_first_space(self) -> bool:
        """Whether `decode` removes the first space, because `encode` added it."""
        return self.vocabulary.add_space_prefix and self.vocabulary.model == "llama"

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of token ids. Bytes that are not valid UTF-8 become U+FFFD.

        special: include special tokens; False: omit them, except for `vocabulary.visible` such as <|tool_call|>.

        Raises OptionError for an id outside the vocabulary.
        """
        raw = b"".join(self.piece(i, special=special) for i in ids)
        if self.strips_first_space:
            raw = raw.removeprefix(b" ")
        return raw.decode("utf-8", "replace")

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self.n_vocab:
            raise OptionError(f"token id {token_id} is outside the vocabulary, expected 0 to {self.n_vocab - 1}")


def _byte_of(token: str) -> bytes:
    """Return the byte of a token such as `<0x0A>`."""
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(match[1], 16)]) if match else token.encode()
