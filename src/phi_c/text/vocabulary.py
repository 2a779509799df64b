"""The vocabulary that a GGUF file carries, checked: tokens, kinds, scores or merges, and which tokens are special.

Keys follow the GGUF specification (tokenizer.ggml.*); defaults are llama.cpp's.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi_c.errors import ModelFileError, UnsupportedModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Tokens that end a turn or a text, whatever the file's own eos says.
_END_TOKENS = (
    "<|end|>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "</s>",
)
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

# Control tokens that are part of what the model says: Phi-4-mini's tokenizer.json does not call them special.
_SHOWN_TOKENS = ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>")
_WITH_BOS = ("llama-bpe", "llama3")  # pre-tokenizers whose files need not say add_bos_token


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id.

    Ids of `special` are given only by text that is asked to be parsed, and stand for no text: control tokens, all
    that end a generation, and what is written <|so|>. Those of `shown` are part of the decoded text nevertheless.
    """

    model: str  # "llama": SentencePiece BPE by scores, "gpt2": byte-level BPE by merges
    pre: str  # pre-tokenizer of a gpt2 model
    tokens: list[str]
    kinds: list[int]
    scores: list[float]  # empty for gpt2
    merges: list[tuple[str, str]]  # empty for llama
    bos_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]
    special: frozenset[int]
    shown: frozenset[int]
    lstrip: frozenset[int]  # special tokens that take the white space to their left
    rstrip: frozenset[int]  # and to their right
    add_bos: bool
    add_space_prefix: bool

    def special_pattern(self) -> re.Pattern[str] | None:
        """Return what matches any special token in a text, the longest first."""
        texts = sorted((self.tokens[i] for i in self.special if self.tokens[i]), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary in a GGUF file's metadata; raises ModelFileError, UnsupportedModelError."""
    model = _get(metadata, "model", str, "a string")
    if model not in ("llama", "gpt2"):
        raise UnsupportedModelError(
            f"tokenizer.ggml.model is {model!r}, expected 'llama' (SentencePiece) or 'gpt2' (byte-level BPE)"
        )
    tokens = _strings(metadata, "tokens")
    if not tokens:
        raise ModelFileError("tokenizer.ggml.tokens is empty")
    token_types = _numbers(metadata, "token_type", len(tokens), default=NORMAL)
    if any(map(math.isinf, token_types)):
        raise ModelFileError("tokenizer.ggml.token_type holds an infinite value")
    kinds = [int(k) for k in token_types]
    is_spm = model == "llama"
    merges = [] if is_spm else _merges(metadata)
    end_ids = {i for key in _END_KEYS if (i := _token_id(metadata, key, len(tokens))) is not None}
    named = {token: i for i, token in enumerate(tokens) if kinds[i] in (CONTROL, USER_DEFINED)}
    end_ids |= {named[token] for token in _END_TOKENS if token in named}
    control = {i for i, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)}
    marked = {i for token, i in named.items() if kinds[i] == USER_DEFINED and re.fullmatch(r"<\|.+\|>", token)}
    shown = (marked | {named[token] for token in _SHOWN_TOKENS if token in named}) - end_ids
    lstrip, rstrip = _stripping(named)
    pre = _get(metadata, "pre", str, "a string", "default")
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        scores=[float(s) for s in _numbers(metadata, "scores", len(tokens), default=0.0)] if is_spm else [],
        merges=merges,
        bos_id=_token_id(metadata, "bos_token_id", len(tokens)),
        eos_id=_token_id(metadata, "eos_token_id", len(tokens)),
        eog_ids=frozenset(end_ids),
        special=frozenset(control | end_ids | marked),
        shown=frozenset(shown),
        lstrip=lstrip,
        rstrip=rstrip,
        add_bos=_get(metadata, "add_bos_token", bool, "a bool", is_spm or pre in _WITH_BOS),
        add_space_prefix=_get(metadata, "add_space_prefix", bool, "a bool", is_spm),
    )


def _stripping(named: Mapping[str, int]) -> tuple[frozenset[int], frozenset[int]]:
    """Return the special tokens that take white space to their left, and to their right.

    GGUF files do not say so. The vocabulary, not the model's name, tells which published tokenizer.json it is from.
    """
    marked = {token: i for token, i in named.items() if token.startswith("<|")}
    if {"<|im_sep|>", "<|dummy_0|>"} <= set(named):  # Phi-4: all of them, on both sides
        return frozenset(marked.values()), frozenset(marked.values())
    if {"<|assistant|>", "<|user|>", "<|end|>"} <= set(named):
        for last, others in (("<|endofprompt|>", ()), ("<|endoftext|>", ("</s>",))):  # Phi-4-mini; Phi-3
            if last in named and set(others) <= set(named):
                after = {i for i in marked.values() if i > named[last]}
                return frozenset(), frozenset(after | {named[token] for token in others})
    return frozenset(), frozenset()


def _get(metadata: Mapping[str, Any], name: str, kind: type, expected: str, default: Any = None) -> Any:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key, default)
    if value is None:
        raise ModelFileError(f"the metadata key {key} is missing")
    if not isinstance(value, kind):
        raise ModelFileError(f"{key} is a {type(value).__name__}, expected {expected}")
    return value


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = _get(metadata, name, list, "an array of strings")
    if not all(isinstance(value, str) for value in values):
        raise ModelFileError(f"tokenizer.ggml.{name} holds other values than strings")
    return list(values)


def _numbers(metadata: Mapping[str, Any], name: str, count: int, default: float) -> Sequence[float]:
    key = f"tokenizer.ggml.{name}"
    values = metadata.get(key)
    if values is None:
        return [default] * count
    kind = getattr(getattr(values, "dtype", None), "kind", "")
    if kind not in "iuf" or not kind:
        raise ModelFileError(f"{key} is a {type(values).__name__}, expected an array of numbers")
    if len(values) != count:
        raise ModelFileError(f"{key} has {len(values)} entries, expected {count}, one for each token")
    numbers: list[float] = values.tolist()
    if any(map(math.isnan, numbers)):
        raise ModelFileError(f"{key} holds values that are no number (NaN)")
    return numbers


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for i, merge in enumerate(_strings(metadata, "merges")):
        # From the second character on: a token may begin with a space of its own.
        left, space, right = merge[:1], *merge[1:].partition(" ")[1:]
        left += merge[1:].partition(" ")[0]
        if not space or not left or not right:
            raise ModelFileError(f"tokenizer.ggml.merges: entry {i} is {merge!r}, expected two tokens and a space")
        merges.append((left, right))
    return merges


def _token_id(metadata: Mapping[str, Any], name: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n_tokens:
        # An array is named, not shown: it has several lines.
        found = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
        raise ModelFileError(f"{key} is {found}, expected a token id from 0 to {n_tokens - 1}")
    return value
