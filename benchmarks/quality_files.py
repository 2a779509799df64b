"""Files for quality.py: a model in float32, with outlier channels, in K-quants. They are what they are made from.

A file is read into memory whole as float32, changed without changing what it computes, and written in any types.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gguf
from gguf import GGMLQuantizationType as Type

Floats = npt.NDArray[np.float32]

_SUPER_BLOCK = 256  # columns of a K-quant block
# What reads a norm's output, and what reads the gated product: (the tensor scaled up, those scaled down).
_NORM_READERS = {"attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"), "ffn_norm": ("ffn_gate", "ffn_up")}


@dataclass
class Weights:
    """A model in float32: metadata, tensors, and the type each had in its file."""

    fields: dict[str, tuple[Any, Any, Any]]  # key -> value, GGUF type, GGUF type of an array's elements
    tensors: dict[str, Floats]
    types: dict[str, Type]

    @property
    def architecture(self) -> str:
        """The prefix of the model's own keys."""
        return str(self.fields["general.architecture"][0])

    def size(self, key: str) -> int:
        """Return one of the architecture's integers."""
        return int(self.fields[f"{self.architecture}.{key}"][0])

    def set_size(self, key: str, value: int) -> None:
        """Change or add one of the architecture's integers."""
        self.fields[f"{self.architecture}.{key}"] = (value, gguf.GGUFValueType.UINT32, None)


def read(path: Path) -> Weights:
    """Return a file's weights as the gguf package dequantises them."""
    reader = gguf.GGUFReader(path)
    fields = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            fields[name] = (field.contents(), field.types[0], field.types[-1] if is_array else None)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    return Weights(fields, tensors, {t.name: t.tensor_type for t in reader.tensors})


def write(weights: Weights, path: Path, types: Mapping[str, Type]) -> Path:
    """Write the tensors in the types named for them; return path."""
    writer = gguf.GGUFWriter(path, weights.architecture)
    for name, (value, kind, sub_kind) in weights.fields.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind, sub_kind)
    for name, values in weights.tensors.items():
        writer.add_tensor(name, quantised(values, types[name]), raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expand(path: Path, target: Path) -> Path:
    """Write the file's float32 expansion, which every engine runs in float32; return target."""
    weights = read(path)
    return write(weights, target, dict.fromkeys(weights.types, Type.F32))


def quantised(values: Floats, kind: Type) -> npt.NDArray[Any]:
    """Return the rows in a type: by the gguf package, K-quants by libgguf (ggml's own code)."""
    if kind == Type.F32:
        return values
    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(values, kind)
    import libgguf

    return libgguf.quantize_rows(np.ascontiguousarray(values), int(kind))


def plant(weights: Weights, factor: float, n_channels: int) -> None:
    """Make a few channels of the activations `factor` times as large, as they are in large models, in every layer.

    The channels of what attention and feed-forward read: the norm's weight grows, the columns that read it shrink. The
    channels of what down reads: rows of up grow, columns of down shrink. In float32 the model computes the same; in
    each block of activations that holds such a channel the others lose bits.
    """
    rng = np.random.default_rng(0)
    n_embd, n_ffn = weights.size("embedding_length"), weights.size("feed_forward_length")
    for i in range(weights.size("block_count")):
        for norm, readers in _NORM_READERS.items():
            channels = rng.choice(n_embd, n_channels, replace=False)
            weights.tensors[f"blk.{i}.{norm}.weight"][channels] *= factor
            for reader in readers:
                if f"blk.{i}.{reader}.weight" in weights.tensors:
                    weights.tensors[f"blk.{i}.{reader}.weight"][:, channels] /= factor
        channels = rng.choice(n_ffn, n_channels, replace=False)
        weights.tensors[f"blk.{i}.ffn_up.weight"][channels - n_ffn] *= factor  # from the end: a fused gate precedes
        weights.tensors[f"blk.{i}.ffn_down.weight"][:, channels] /= factor


def pad_to_super_blocks(weights: Weights) -> None:
    """Widen a `llama` model with zero channels and zero heads until K-quants divide its rows.

    Zero channels are spread evenly, zero heads come last. The mean of squares falls by the share of zeros, so norms and
    their epsilon shrink to match: in float32 the model computes the same.
    """
    n_embd, n_heads, n_kv_heads = (
        weights.size(key) for key in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    head_dim = n_embd // n_heads
    width = _rounded_up(n_embd)
    channels = np.arange(n_embd) * width // n_embd
    group = n_heads // n_kv_heads
    n_kv_wide = n_kv_heads
    while n_kv_wide * group * head_dim % _SUPER_BLOCK:
        n_kv_wide += 1
    q_width, kv_width = n_kv_wide * group * head_dim, n_kv_wide * head_dim
    heads = np.arange(n_heads * head_dim)
    to_rows: dict[str, Callable[[Floats], Floats]] = {
        "attn_q": lambda w: _spread(w, heads, q_width),
        "attn_k": lambda w: _spread(w, heads[: len(w)], kv_width),
        "attn_v": lambda w: _spread(w, heads[: len(w)], kv_width),
        "attn_output": lambda w: _spread(w, channels, width),
        "ffn_down": lambda w: _spread(w, channels, width),
    }
    for name, values in weights.tensors.items():
        part = name.split(".")[-2]
        if part.endswith("norm"):
            weights.tensors[name] = _spread(values, channels, width) * np.float32((n_embd / width) ** 0.5)
            continue
        rows = to_rows[part](values) if part in to_rows else values
        if part == "attn_output":
            rows = _spread(rows.T, heads, q_width).T
        elif part != "ffn_down":
            rows = _spread(rows.T, channels, width).T
        weights.tensors[name] = rows
    weights.set_size("embedding_length", width)
    weights.set_size("attention.head_count", n_kv_wide * group)
    weights.set_size("attention.head_count_kv", n_kv_wide)
    weights.set_size("attention.key_length", head_dim)
    weights.set_size("attention.value_length", head_dim)
    key = f"{weights.architecture}.attention.layer_norm_rms_epsilon"
    weights.fields[key] = (weights.fields[key][0] * n_embd / width, *weights.fields[key][1:])


def k_quants(weights: Weights) -> dict[str, Type]:
    """Return the types of a Q4_K_M file of Phi-3: q, k, v Q5_K, output and a third of down Q6_K, the rest Q4_K."""
    types = {}
    for name, values in weights.tensors.items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        if values.ndim == 1:
            types[name] = Type.F32
        elif name in ("token_embd.weight", "output.weight") or ("ffn_down" in name and layer % 3 == 0):
            types[name] = Type.Q6_K
        else:
            types[name] = Type.Q5_K if any(part in name for part in ("attn_q", "attn_k", "attn_v")) else Type.Q4_K
    return types


def all_q8_0(weights: Weights) -> dict[str, Type]:
    """Return Q8_0 for every matrix."""
    return {name: Type.F32 if values.ndim == 1 else Type.Q8_0 for name, values in weights.tensors.items()}


def _rounded_up(n: int) -> int:
    return -(-n // _SUPER_BLOCK) * _SUPER_BLOCK


def _spread(values: Floats, positions: npt.NDArray[np.int64], length: int) -> Floats:
    """Return [length, ...] with the rows of values at these positions and zeros elsewhere."""
    out = np.zeros((length, *values.shape[1:]), np.float32)
    out[positions] = values
    return out
