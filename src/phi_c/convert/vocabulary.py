"""Converts the tokenizer of a Hugging Face folder to GGUF metadata.

The metadata contains the tokens, their types, scores or merges, the special token ids and the chat template.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import gguf
from phi_c.convert.hf_folder import read_json
from phi_c.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from phi_c.text.backend import build_backend, load_backend
from phi_c.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary

Metadata = dict[str, Any]  # keys without the prefix "tokenizer.ggml."

# Scores that llama.cpp's converter writes for added tokens and for padding.
_ADDED_SCORE = -1000.0
_PAD_SCORE = -10000.0

# The pre-tokenizers of text/backend.py, without synonyms. llama-bpe is dbrx with whole words matched first.
_PRE_NAMES = ("gpt-2", "smollm", "llama-bpe", "dbrx", "gpt-4o")
_PRE_OF_ARCHITECTURE = {("phi2", "gpt-2"): "phi-2"}  # llama.cpp's name for gpt-2 in phi2 files

# Texts that distinguish the pre-tokenizers, and for which a converted vocabulary must give the same ids.
PROBES = (
    "Hello world, it's we'll you'RE I'd they'VE.",
    "In 2024, 1234567 people paid $3.50 (100%) at 12:30!",
    "  two  spaces\n\nand\tlines \r\n\r\n  end  ",
    "for (int i = 0; i < n; ++i) { a[i] += b/c; } // camelCase HTTPServer x_1\n/path/to/",
    "Über café naïve Привет γειά नमस्ते שלום 你好，世界。😀½٣",  # noqa: RUF001
)


def read_tokenizer(path: Path, architecture: str, n_vocab: int) -> Metadata:
    """Return the GGUF metadata of the tokenizer in a folder.

    path: folder with tokenizer.json or tokenizer.model.
    architecture: general.architecture of the GGUF file.
    n_vocab: rows of the embedding; ids without a token become unused tokens.

    Raises ModelNotFoundError, ModelFileError, and UnsupportedModelError for a tokenizer that GGUF cannot represent.
    """
    content = read_json(path / "tokenizer.json")
    if content is not None:
        metadata = _from_json(path / "tokenizer.json", content, architecture, n_vocab)
    elif (path / "tokenizer.model").is_file():
        metadata = _from_sentencepiece(path, n_vocab)
    else:
        raise ModelNotFoundError(f"{path} has neither tokenizer.json nor tokenizer.model")
    special, template = _special(path, n_vocab)
    metadata |= special
    if content is not None:
        _check_same_ids(path / "tokenizer.json", metadata)
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()} | template


def _from_json(path: Path, content: dict[str, Any], architecture: str, n_vocab: int) -> Metadata:
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedModelError(f"{path}: expected a BPE vocabulary, the only kind that phi-c converts")
    backend = _backend(path)  # validates the file, so the code below can rely on its structure
    tokens, kinds = _tokens(path, model["vocab"], content.get("added_tokens") or [], n_vocab)
    try:
        merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
        if not all(len(m) == 2 for m in merges):
            raise TypeError
    except TypeError:
        raise ModelFileError(f"{path}: the merges are corrupt, expected pairs of tokens") from None
    metadata: Metadata = {"tokens": tokens, "token_type": kinds}
    if not model.get("byte_fallback"):
        pre = _pre_tokenizer(path, backend, architecture, ignore_merges=bool(model.get("ignore_merges")))
        return {"model": "gpt2", "pre": pre, **metadata, "merges": [" ".join(merge) for merge in merges]}
    for i, token in enumerate(tokens):
        if kinds[i] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[i] = BYTE
    scores = _scores(tokens, kinds, merges)
    return {
        "model": "llama",
        "pre": "default",
        **metadata,
        "scores": scores,
        "add_space_prefix": _adds_space_prefix(content),
    }


def _tokens(path: Path, vocab: dict[str, Any], added: Any, n_vocab: int) -> tuple[list[str], list[int]]:
    """Return the tokens by id and their types; ids without a token become unused tokens named [PADn]."""
    tokens, kinds = [f"[PAD{i}]" for i in range(n_vocab)], [UNUSED] * n_vocab
    try:
        entries = [(i, token, NORMAL) for token, i in vocab.items()]
        entries += [(t["id"], t["content"], CONTROL if t["special"] else USER_DEFINED) for t in added]
    except (TypeError, KeyError):
        raise ModelFileError(
            f"{path}: added_tokens is corrupt, expected entries with id, content and special"
        ) from None
    for i, token, kind in entries:
        if type(i) is not int or not isinstance(token, str) or not 0 <= i < n_vocab:
            raise ModelFileError(f"{path}: the token {token!r:.60} has the id {i!r}, expected 0 to {n_vocab - 1}")
        tokens[i], kinds[i] = token, kind
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Return SentencePiece scores: the negated rank of the first merge that produces each token."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scores = []
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == NORMAL:
            scores.append(-float(ranks.get(token, len(ranks) + i)))
        else:
            scores.append({BYTE: 0.0, UNUSED: _PAD_SCORE}.get(kind, _ADDED_SCORE))
    return scores


def _adds_space_prefix(content: dict[str, Any]) -> bool:
    """Return whether tokenizer.json prepends a space to the text."""
    steps: list[dict[str, Any]] = []
    for part in ("normalizer", "pre_tokenizer"):
        step = content.get(part)
        step = step if isinstance(step, dict) else {}
        steps += step.get("normalizers") or step.get("pretokenizers") or [step]
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
        if isinstance(step, dict)
    )


def _pre_tokenizer(path: Path, backend: Tokenizer, architecture: str, *, ignore_merges: bool) -> str:
    """Return the name of the pre-tokenizer that splits PROBES as the file's does; regexes are not compared."""
    if backend.normalizer is not None or backend.pre_tokenizer is None:
        raise UnsupportedModelError(f"{path}: expected a byte-level BPE with a pre-tokenizer and no normalizer")
    for name in _PRE_NAMES:
        metadata = {"model": "gpt2", "pre": name, "tokens": ["a"], "merges": []}
        ours = build_backend(read_vocabulary({f"tokenizer.ggml.{k}": v for k, v in metadata.items()}))
        if ignore_merges != ours.model.ignore_merges or ours.pre_tokenizer is None:
            continue
        split = ours.pre_tokenizer.pre_tokenize_str
        if all(split(text) == backend.pre_tokenizer.pre_tokenize_str(text) for text in PROBES):
            return _PRE_OF_ARCHITECTURE.get((architecture, name), name)
    raise UnsupportedModelError(f"{path}: unknown pre-tokenizer, expected one equivalent to {', '.join(_PRE_NAMES)}")


def _backend(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"{path} is not a valid tokenizer.json: {' '.join(str(error).split())}") from None


def _from_sentencepiece(path: Path, n_vocab: int) -> Metadata:
    try:
        from sentencepiece import SentencePieceProcessor  # noqa: PLC0415 - for folders without tokenizer.json
    except ImportError:
        raise UnsupportedModelError(
            f"{path} has no tokenizer.json, and tokenizer.model cannot be read: pip install sentencepiece"
        ) from None
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(path / "tokenizer.model"))
    except (OSError, RuntimeError) as error:
        raise ModelFileError(f"{path / 'tokenizer.model'} cannot be read: {error}") from None
    vocab = {processor.IdToPiece(i): i for i in range(processor.GetPieceSize())}
    added = (read_json(path / "tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    added = [{"id": int(i), **token} for i, token in added.items()]
    tokens, kinds = _tokens(path / "tokenizer.model", vocab, added, n_vocab)
    scores = [_PAD_SCORE] * n_vocab
    for i in range(processor.GetPieceSize()):
        scores[i] = processor.GetScore(i)
        if processor.IsByte(i):
            kinds[i] = BYTE
        elif kinds[i] == NORMAL and (processor.IsControl(i) or processor.IsUnknown(i)):
            kinds[i] = CONTROL if processor.IsControl(i) else UNKNOWN
    scores = [_ADDED_SCORE if kinds[i] in (CONTROL, USER_DEFINED) else score for i, score in enumerate(scores)]
    return {"model": "llama", "pre": "default", "tokens": tokens, "token_type": kinds, "scores": scores}


def _special(path: Path, n_vocab: int) -> tuple[Metadata, Metadata]:
    """Return the special token ids with add_bos and add_eos, and the chat template, as the gguf package reads them."""
    generation = read_json(path / "generation_config.json") or {}
    read_json(path / "tokenizer_config.json")  # raises for a corrupt file, which the gguf package would not
    # The package warns about ids that it ignores, although they may be valid ids of the model.
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
    try:
        found = gguf.SpecialVocab(path, n_vocab=n_vocab)
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise ModelFileError(f"{path}: the special tokens cannot be read: {' '.join(str(error).split())}") from None
    names = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # as GGUF spells them
    ids = {f"{names.get(kind, kind)}_token_id": i for kind, i in found.special_token_ids.items()}
    ends = generation.get("eos_token_id")
    others = [i for i in ends if i != ids.get("eos_token_id")] if isinstance(ends, list) else []
    if others and "eot_token_id" not in ids and type(others[0]) is int and 0 <= others[0] < n_vocab:
        ids["eot_token_id"] = others[0]
    added = {kind: value for kind, value in found.add_special_token.items() if kind in ("bos", "eos")}
    template = found.chat_template
    if isinstance(template, list):  # several named templates
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    special = ids | {f"add_{kind}_token": value for kind, value in added.items()}
    return special, {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _check_same_ids(path: Path, metadata: Metadata) -> None:
    """Raise UnsupportedModelError if the converted vocabulary gives other ids than tokenizer.json for PROBES."""
    arrays = {key: np.array(metadata[key]) for key in ("token_type", "scores") if key in metadata}
    vocabulary = read_vocabulary({f"tokenizer.ggml.{k}": v for k, v in (metadata | arrays).items()})
    ours, (theirs, _) = build_backend(vocabulary), load_backend(path, vocabulary)
    for text in PROBES:
        if ours.encode(text, add_special_tokens=False).ids != theirs.encode(text, add_special_tokens=False).ids:
            raise UnsupportedModelError(
                f"{path}: GGUF cannot represent this tokenizer: {json.dumps(text)} gets different ids"
            )
