"""The `tokenizers` pipeline of a vocabulary: BPE over plain text. It never recognises special tokens."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from phi_c.errors import ModelFileError, UnsupportedModelError
from phi_c.text.vocabulary import BYTE, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary

SPACE = "\u2581"  # SentencePiece's character for a space

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# Keys: values of tokenizer.ggml.pre. Source: published tokenizer.json of GPT-2, SmolLM, Llama 3, Phi-4, Phi-4-mini.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _byte_level,
    "gpt-2": _byte_level,
    "phi-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": lambda: _split(_CL100K),
    "llama3": lambda: _split(_CL100K),
    "dbrx": lambda: _split(_CL100K),
    "cl100k": lambda: _split(_CL100K),
    "gpt-4o": lambda: _split(_O200K),
}
_IGNORE_MERGES = ("llama-bpe", "llama3")  # a word that is itself a token is not split by merges
_PLACEHOLDER_KINDS = (UNKNOWN, UNUSED)  # converters fill gaps in the ids with names of their own


def build_backend(vocabulary: Vocabulary) -> Tokenizer:
    """Build the pipeline of a GGUF vocabulary. Raises UnsupportedModelError, ModelFileError."""
    if vocabulary.model == "gpt2" and vocabulary.pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre is {vocabulary.pre!r}, expected one of {', '.join(PRE_TOKENIZERS)}"
        )
    ids = {token: i for i, token in reversed(list(enumerate(vocabulary.tokens)))}
    is_spm = vocabulary.model == "llama"
    merges = _merges_from_scores(vocabulary, ids) if is_spm else vocabulary.merges
    for left, right in vocabulary.merges:
        if left not in ids or right not in ids or left + right not in ids:
            raise ModelFileError(f"tokenizer.ggml.merges: {left!r}, {right!r} or both joined are not in the vocabulary")
    if is_spm:
        backend = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token=vocabulary.tokens[0]))
        steps: list[Any] = [normalizers.Replace(" ", SPACE)]
        if vocabulary.add_space_prefix:
            steps.insert(0, normalizers.Prepend(SPACE))
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend = Tokenizer(models.BPE(ids, merges, ignore_merges=vocabulary.pre in _IGNORE_MERGES))
        backend.pre_tokenizer = PRE_TOKENIZERS[vocabulary.pre]()
    user_defined = (
        AddedToken(vocabulary.tokens[i], normalized=False)
        for i, kind in enumerate(vocabulary.kinds)
        if kind == USER_DEFINED and i not in vocabulary.special and vocabulary.tokens[i]
    )
    backend.add_tokens(list(user_defined))
    return backend


def _merges_from_scores(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return the merges equivalent to SentencePiece's scores: the splits of each token, highest score first.

    The splits of one token are ordered by the ids of their parts, as in the tokenizer.json that transformers writes.
    """
    mergeable_kinds = (NORMAL, USER_DEFINED)
    mergeable = {token: i for token, i in ids.items() if vocabulary.kinds[i] in mergeable_kinds}
    # Single characters have no merges: one that is not a token falls back to its bytes.
    order = sorted(
        (i for i, kind in enumerate(vocabulary.kinds) if kind in mergeable_kinds and len(vocabulary.tokens[i]) > 1),
        key=lambda i: -vocabulary.scores[i],
    )
    merges = []
    for token in (vocabulary.tokens[i] for i in order):
        splits = [
            (mergeable[left], left, right)  # unique: each split of a token has another left part
            for cut in range(1, len(token))
            if (left := token[:cut]) in mergeable and (right := token[cut:]) in mergeable
        ]
        splits.sort()
        merges += [(left, right) for _, left, right in splits]
    return merges


def load_backend(path: Path, vocabulary: Vocabulary) -> tuple[Tokenizer, Vocabulary]:
    """Return the pipeline of a tokenizer.json, without its special tokens, and the vocabulary with their flags.

    path: of the tokenizer.json.
    vocabulary: of the GGUF file; lstrip, rstrip and visible are replaced by those of the tokenizer.json.

    Raises ModelFileError if the file is not a usable tokenizer.json, or belongs to another model.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        added = list(content.get("added_tokens") or [])
        _check_same_tokens(path, content["model"]["vocab"], added, vocabulary)
        content["added_tokens"] = [token for token in added if token["id"] not in vocabulary.special]
        content |= {"post_processor": None, "truncation": None, "padding": None}
        backend = Tokenizer.from_str(json.dumps(content))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except ModelFileError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"{path} is not a usable tokenizer.json: {error}") from None
    special = [token for token in added if token["id"] in vocabulary.special]
    return backend, replace(
        vocabulary,
        lstrip=frozenset(token["id"] for token in special if token.get("lstrip")),
        rstrip=frozenset(token["id"] for token in special if token.get("rstrip")),
        visible=frozenset(token["id"] for token in special if not token.get("special")) - vocabulary.eog_ids,
    )


def _check_same_tokens(path: Path, vocab: Any, added: list[dict[str, Any]], vocabulary: Vocabulary) -> None:
    if not isinstance(vocab, dict):
        raise ModelFileError(f"{path}: the vocabulary is not a mapping, expected a BPE model")
    entries = [*vocab.items(), *((token["content"], token["id"]) for token in added)]
    for token, token_id in entries:
        if token_id >= len(vocabulary.tokens):
            raise ModelFileError(
                f"{path} belongs to another model: it has a token with id {token_id}, "
                f"the model has {len(vocabulary.tokens)} tokens"
            )
        expected = vocabulary.tokens[token_id]
        if token != expected and vocabulary.kinds[token_id] not in (BYTE, *_PLACEHOLDER_KINDS):
            raise ModelFileError(
                f"{path} belongs to another model: its token {token_id} is {token!r}, the model's is {expected!r}"
            )
