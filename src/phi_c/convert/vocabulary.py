"""The tokenizer of a Hugging Face folder as GGUF metadata: tokens, types, scores or merges, special ids, template."""

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

Metadata = dict[str, Any]  # keys without "tokenizer.ggml."

_ADDED_SCORE = -1000.0  # what llama.cpp gives tokens that no merge makes
_PAD_SCORE = -10000.0

# Pre-tokenizers that the engine has, under one name each; llama-bpe is dbrx with whole words first.
_PRE_NAMES = ("gpt-2", "smollm", "llama-bpe", "dbrx", "gpt-4o")
_PRE_OF_ARCHITECTURE = {("phi2", "gpt-2"): "phi-2"}  # llama.cpp's name for it there

# Texts on which two pre-tokenizers differ if they differ at all, and on which a vocabulary must give the same ids.
PROBES = (
    "Hello world, it's we'll you'RE I'd they'VE.",
    "In 2024, 1234567 people paid $3.50 (100%) at 12:30!",
    "  two  spaces\n\nand\tlines \r\n\r\n  end  ",
    "for (int i = 0; i < n; ++i) { a[i] += b/c; } // camelCase HTTPServer x_1\n/path/to/",
    "Über café naïve Привет γειά नमस्ते שלום 你好，世界。😀½٣",  # noqa: RUF001
)


def read_tokenizer(path: Path, architecture: str, n_vocab: int) -> Metadata:
    """Return the metadata of the tokenizer in a folder; n_vocab: rows of the embedding, which it fills up.

    Raises ModelNotFoundError, ModelFileError, UnsupportedModelError for a tokenizer that GGUF cannot say.
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
        raise UnsupportedModelError(f"{path} holds no BPE vocabulary, which is all that phi-c converts")
    backend = _backend(path)  # its reading is strict: what follows may rely on the parts
    tokens, kinds = _tokens(path, model["vocab"], content.get("added_tokens") or [], n_vocab)
    try:
        merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
        if not all(len(m) == 2 for m in merges):
            raise TypeError
    except TypeError:
        raise ModelFileError(f"{path}: the merges are damaged, expected pairs of tokens") from None
    metadata: Metadata = {"tokens": tokens, "token_type": kinds}
    if not model.get("byte_fallback"):
        pre = _pre_tokenizer(path, backend, architecture, ignore_merges=bool(model.get("ignore_merges")))
        return {"model": "gpt2", "pre": pre, **metadata, "merges": [" ".join(merge) for merge in merges]}
    for i, token in enumerate(tokens):
        if kinds[i] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[i] = BYTE
    spaced = {"add_space_prefix": _adds_space(content)}
    return {"model": "llama", "pre": "default", **metadata, "scores": _scores(tokens, kinds, merges), **spaced}


def _tokens(path: Path, vocab: dict[str, Any], added: Any, n_vocab: int) -> tuple[list[str], list[int]]:
    """Return tokens by id and their types; ids that nothing names become unused ones."""
    tokens, kinds = [f"[PAD{i}]" for i in range(n_vocab)], [UNUSED] * n_vocab
    try:
        named = [(i, token, NORMAL) for token, i in vocab.items()]
        named += [(t["id"], t["content"], CONTROL if t["special"] else USER_DEFINED) for t in added]
    except (TypeError, KeyError):
        raise ModelFileError(f"{path}: added_tokens is damaged, expected id, content and special of each") from None
    for i, token, kind in named:
        if type(i) is not int or not isinstance(token, str) or not 0 <= i < n_vocab:
            raise ModelFileError(f"{path}: the token {token!r:.60} has the id {i!r}, expected 0 to {n_vocab - 1}")
        tokens[i], kinds[i] = token, kind
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Return SentencePiece's scores: minus the rank of the first merge that makes a token."""
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


def _adds_space(content: dict[str, Any]) -> bool:
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
    """Return the name of the pre-tokenizer that cuts texts as the file's does, however its patterns are written."""
    if backend.normalizer is not None or backend.pre_tokenizer is None:
        raise UnsupportedModelError(f"{path}: expected a byte-level BPE with a pre-tokenizer and no normalizer")
    for name in _PRE_NAMES:
        metadata = {"model": "gpt2", "pre": name, "tokens": ["a"], "merges": []}
        ours = build_backend(read_vocabulary({f"tokenizer.ggml.{k}": v for k, v in metadata.items()}))
        if ignore_merges != ours.model.ignore_merges or ours.pre_tokenizer is None:
            continue
        cut = ours.pre_tokenizer.pre_tokenize_str
        if all(cut(text) == backend.pre_tokenizer.pre_tokenize_str(text) for text in PROBES):
            return _PRE_OF_ARCHITECTURE.get((architecture, name), name)
    raise UnsupportedModelError(f"{path}: its pre-tokenizer cuts texts as none of {', '.join(_PRE_NAMES)} does")


def _backend(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"{path} is not a tokenizer.json that can be used: {error}") from None


def _from_sentencepiece(path: Path, n_vocab: int) -> Metadata:
    try:
        from sentencepiece import SentencePieceProcessor  # noqa: PLC0415 - for folders without tokenizer.json
    except ImportError:
        raise UnsupportedModelError(
            f"{path} has tokenizer.model but no tokenizer.json: `pip install sentencepiece` reads the former"
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
    """Return special ids and whether BOS and EOS are added, and the template, by the gguf package's reading."""
    generation = read_json(path / "generation_config.json") or {}
    read_json(path / "tokenizer_config.json")  # for its errors
    # It warns of ids that it leaves out, which the model may well have.
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
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    special = ids | {f"add_{kind}_token": value for kind, value in added.items()}
    return special, {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _check_same_ids(path: Path, metadata: Metadata) -> None:
    """Refuse a vocabulary that gives other ids than tokenizer.json: GGUF has no place for what makes the difference."""
    arrays = {key: np.array(metadata[key]) for key in ("token_type", "scores") if key in metadata}
    vocabulary = read_vocabulary({f"tokenizer.ggml.{k}": v for k, v in (metadata | arrays).items()})
    ours, (theirs, _) = build_backend(vocabulary), load_backend(path, vocabulary)
    for text in PROBES:
        if ours.encode(text, add_special_tokens=False).ids != theirs.encode(text, add_special_tokens=False).ids:
            raise UnsupportedModelError(
                f"{path}: says what a GGUF vocabulary cannot: the latter cuts {json.dumps(text)} into other tokens"
            )
