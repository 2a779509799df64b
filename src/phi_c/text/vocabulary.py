"""Reads and checks the vocabulary of a GGUF file: tokens, their kinds, scores or merges, and the special tokens.

Keys are those of the GGUF specification (tokenizer.ggml.*); defaults are llama.cpp's.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi_c.errors import ModelFileError, UnsupportedModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds: tokenizer.ggml.token_type

# Tokens that end a generation in addition to the file's own eos, eot and eom ids.
_EOG_TOKENS = (
    "<|end|>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "</s>",
)
_EOG_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

# Control tokens that are part of the output text: Phi-4-mini's tokenizer.json does not mark them as special.
_VISIBLE_TOKENS = ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>")
_WITH_BOS = ("llama-bpe", "llama3")  # pre-tokenizers for which add_bos_token defaults to true


@dataclass(frozen=True)
class Vocabulary:
    """A checked vocabulary; lists are indexed by token id."""

    model: str  # "llama": SentencePiece BPE with scores; "gpt2": byte-level BPE with merges
    pre: str  # name of the pre-tokenizer of a gpt2 model
    tokens: list[str]
    kinds: list[int]  # NORMAL to BYTE
    scores: list[float]  # empty for gpt2
    merges: list[tuple[str, str]]  # empty for llama
    bos_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]  # tokens that end a generation
    # Control tokens, end-of-generation tokens and tokens of the form <|name|>. Encoded only with parse_special; omitted
    # from decoded text unless they are also in `visible`.
    special: frozenset[int]
    visible: frozenset[int]  # special tokens that are part of decoded text
    lstrip: frozenset[int]  # special tokens that absorb white space to their left
    rstrip: frozenset[int]  # special tokens that absorb white space to their right
    add_bos: bool  # begin every sequence with bos_id
    add_space_prefix: bool  # put a space before the text (SentencePiece)

    def special_pattern(self) -> re.Pattern[str] | None:
        """Return a pattern that matches any special token, preferring the longest; None if there are none."""
        names = sorted((self.tokens[i] for i in self.special if self.tokens[i]), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary in a GGUF file's metadata. Raises ModelFileError, UnsupportedModelError."""
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
        raise ModelFileError("tokenizer.ggml.token_type contains an infinite value")
    kinds = [int(k) for k in token_types]
    is_spm = model == "llama"
    merges = [] if is_spm else _merges(metadata)
    eog_ids = {i for key in _EOG_KEYS if (i := _token_id(metadata, key, len(tokens))) is not None}
    named = {token: i for i, token in enumerate(tokens) if kinds[i] in (CONTROL, USER_DEFINED)}
    eog_ids |= {named[token] for token in _EOG_TOKENS if token in named}
    control = {i for i, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)}
    marked = {i for token, i in named.items() if kinds[i] == USER_DEFINED and re.fullmatch(r"<\|.+\|>", token)}
    visible = (marked | {named[token] for token in _VISIBLE_TOKENS if token in named}) - eog_ids
    lstrip, rstrip = _strip_flags(named)
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
        eog_ids=frozenset(eog_ids),
        special=frozenset(control | eog_ids | marked),
        visible=frozenset(visible),
        lstrip=lstrip,
        rstrip=rstrip,
        add_bos=_get(metadata, "add_bos_token", bool, "a bool", is_spm or pre in _WITH_BOS),
        add_space_prefix=_get(metadata, "add_space_prefix", bool, "a bool", is_spm),
    )


def _strip_flags(named: Mapping[str, int]) -> tuple[frozenset[int], frozenset[int]]:
    """Return the special tokens that absorb white space to their left, and those that absorb it to their right.

    GGUF files do not store these flags. They are taken from the published tokenizer.json, which is identified by the
    tokens in the vocabulary, not by the model's name.
    """
    marked = {token: i for token, i in named.items() if token.startswith("<|")}
    if {"<|im_sep|>", "<|dummy_0|>"} <= set(named):  # Phi-4: all, on both sides
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
        raise ModelFileError(f"tokenizer.ggml.{name} has values that are not strings")
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
        raise ModelFileError(f"{key} has {len(values)} entries, expected {count}: one per token")
    numbers: list[float] = values.tolist()
    if any(map(math.isnan, numbers)):
        raise ModelFileError(f"{key} contains NaN")
    return numbers


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for i, merge in enumerate(_strings(metadata, "merges")):
        # The separator is not the first character: a token may begin with a space.
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
        # The value of an array would take several lines, so only its type is reported.
        found = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
        raise ModelFileError(f"{key} is {found}, expected a token id from 0 to {n_tokens - 1}")
    return value
