"""Mutates a GGUF file while keeping its lengths and counts consistent, which a mutation of bytes rarely does.

Half of the mutations are left to the fuzzer's own, of bytes.
"""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from raw_gguf import gguf, string, tensor

Mutate = Callable[[bytes, int], bytes]  # the fuzzer's own mutation: (data, maximum size in bytes)

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ARCHITECTURES = ("phi3", "llama", "phi2", "phimoe")
# Keys and tensors that the loader reads, and some that it rejects.
_KEYS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor"),
    *("rope.scaling.original_context_length", "expert_count", "expert_used_count", "attention.scale", "logit_scale"),
)
_GENERAL = (
    *("general.alignment", "general.architecture", "general.name", "split.count", "tokenizer.ggml.add_space_prefix"),
    *(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges", "model", "pre")),
    *(f"tokenizer.ggml.{name}" for name in ("bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token")),
)
_TENSORS = (
    *("rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight", "output.weight", "output.bias"),
    *("blk.0.attn_output.bias", "blk.0.attn_qkv.weight", "blk.0.attn_qkv.bias", "blk.1.ffn_up.weight"),
)
_TYPE_IDS = (0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 15, 30, 99)
_STRINGS = ("phi3", "llama", "phi2", "phimoe", "gpt2", "default", "llama-bpe", "gpt-4o", "smollm", "longrope", "linear")
_NUMBERS = (0, 1, 2, 3, 4, 6, 8, 16, 32, 33, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, 1e-5, 1e-30, 1e30, 3e38, -1.0, float("inf"), float("nan"))


@dataclass
class _Entry:
    name: bytes
    ne: list[int]
    type_id: int
    offset: int


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read(self, n: int) -> bytes:
        if not 0 <= n <= len(self.data) - self.at:
            raise ValueError("the data is truncated")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, n_bytes: int) -> int:
        return int.from_bytes(self.read(n_bytes), "little")

    def string(self) -> bytes:
        return self.read(self.number(8))

    def value(self, type_id: int) -> bytes:
        start = self.at
        if type_id == _STRING:
            self.string()
        elif type_id == _ARRAY:
            element_type, n = self.number(4), self.number(8)
            if element_type in _SIZES:
                self.read(n * _SIZES[element_type])
            else:
                for _ in range(n):
                    self.value(element_type)
        elif type_id in _SIZES:
            self.read(_SIZES[type_id])
        else:
            raise ValueError(f"unknown value type {type_id}")
        return self.data[start : self.at]


def mutate(data: bytes, max_size: int, seed: int, fuzz: Mutate) -> bytes:
    """Return a mutated copy of at most max_size bytes; deterministic for a seed if `fuzz` is."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return fuzz(data, max_size)
    try:
        keys, entries, body = _parse(data)
    except ValueError:
        return fuzz(data, max_size)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.6:
            _change_keys(rng, keys, fuzz)
        elif kind < 0.9:
            _change_tensors(rng, entries)
        else:
            body = fuzz(body, len(body) + 64) if body else b""
    raw_keys = [string(name) + struct.pack("<I", type_id) + raw for name, type_id, raw in keys]
    tensors = [tensor(e.name, e.ne, e.type_id, e.offset) for e in entries]
    return gguf(raw_keys, tensors, body)[:max_size]


def _parse(data: bytes) -> tuple[list[tuple[bytes, int, bytes]], list[_Entry], bytes]:
    reader = _Reader(data)
    reader.read(8)
    n_tensors, n_keys = reader.number(8), reader.number(8)
    keys = []
    for _ in range(n_keys):
        name, type_id = reader.string(), reader.number(4)
        keys.append((name, type_id, reader.value(type_id)))
    entries = []
    for _ in range(n_tensors):
        name, n_dims = reader.string(), reader.number(4)
        entries.append(_Entry(name, [reader.number(8) for _ in range(n_dims)], reader.number(4), reader.number(8)))
    return keys, entries, data[-(-reader.at // 32) * 32 :]


def _change_keys(rng: random.Random, keys: list[tuple[bytes, int, bytes]], fuzz: Mutate) -> None:
    kind = rng.randrange(6) if keys else 0
    if kind == 0:  # insert a key with a known name
        keys.insert(rng.randrange(len(keys) + 1), (_key_name(rng), *_scalar(rng)))
        return
    i = rng.randrange(len(keys))
    name, type_id, raw = keys[i]
    if kind == 1:
        del keys[i]
    elif kind == 2:
        keys[i] = (_key_name(rng), type_id, raw)
    elif kind == 3:
        keys[i] = (name, *_scalar(rng))
    else:
        keys[i] = (name, type_id, _changed_value(rng, type_id, raw, fuzz))


def _key_name(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return rng.choice(_GENERAL).encode()
    return f"{rng.choice(_ARCHITECTURES)}.{rng.choice(_KEYS)}".encode()


def _scalar(rng: random.Random) -> tuple[int, bytes]:
    kind = rng.choice((4, 4, 4, 5, 6, 7, 8, 10, 11, 12))
    if kind == _STRING:
        return kind, string(rng.choice(_STRINGS))
    if kind in (6, 12):
        return kind, struct.pack("<f" if kind == 6 else "<d", rng.choice(_FLOATS))
    n_bytes = _SIZES[kind]
    return kind, (rng.choice(_NUMBERS[:2] if kind == 7 else _NUMBERS) % 256**n_bytes).to_bytes(n_bytes, "little")


def _changed_value(rng: random.Random, type_id: int, raw: bytes, fuzz: Mutate) -> bytes:
    if type_id == _STRING:
        return string(fuzz(raw[8:] or b" ", len(raw) + 32))
    if type_id != _ARRAY:
        return fuzz(raw, len(raw)).ljust(_SIZES[type_id], b"\0")
    element_type = int.from_bytes(raw[:4], "little")
    if element_type in _SIZES:
        size = _SIZES[element_type]
        if rng.random() < 0.3:
            return _with_other_type(rng, raw, size)
        body = fuzz(raw[12:] or bytes(size), len(raw) + size)
        if rng.random() < 0.5:  # keep the number of elements
            body = body[: len(raw) - 12].ljust(len(raw) - 12, b"\0")
        body = body[: len(body) // size * size]
        return raw[:4] + struct.pack("<Q", len(body) // size) + body
    reader = _Reader(raw)
    reader.read(4)
    items = [reader.value(element_type) for _ in range(reader.number(8))]
    if items and element_type == _STRING:
        i = rng.randrange(len(items))
        if rng.random() < 0.7:
            items[i] = string(fuzz(items[i][8:] or b" ", len(items[i]) + 16))
        elif rng.random() < 0.5:
            items[i] = rng.choice(items)
        else:
            items[i : i + 1] = rng.choice(([], [items[i], items[i]]))
    return raw[:4] + struct.pack("<Q", len(items)) + b"".join(items)


def _with_other_type(rng: random.Random, raw: bytes, size: int) -> bytes:
    """Return an array of the same length and another type, whose elements are 0 or the same number."""
    kind, element = _scalar(rng)
    while kind == _STRING:
        kind, element = _scalar(rng)
    n = (len(raw) - 12) // size
    items = [bytes(len(element)) if rng.random() < 0.2 else element for _ in range(n)]
    return struct.pack("<IQ", kind, n) + b"".join(items)


def _change_tensors(rng: random.Random, entries: list[_Entry]) -> None:
    if not entries:
        return
    i = rng.randrange(len(entries))
    entry = entries[i]
    kind = rng.randrange(6)
    if kind == 0:
        del entries[i]
    elif kind == 1:
        entries.append(_Entry(rng.choice(_TENSORS).encode(), list(entry.ne), entry.type_id, entry.offset))
    elif kind == 2:
        entry.name = rng.choice([rng.choice(_TENSORS).encode(), rng.choice(entries).name])
    elif kind == 3:
        entry.type_id = rng.choice(_TYPE_IDS)
    elif kind == 4 and entry.ne:
        entry.ne[rng.randrange(len(entry.ne))] = rng.choice(_NUMBERS)
    else:
        entry.offset = rng.choice([*_NUMBERS, 32 * rng.randrange(256), rng.choice(entries).offset])
