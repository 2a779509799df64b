"""GGUF files for quality.py: a model expanded to float32, with planted outlier channels, or as K-quants.

A model is read into memory as float32, transformed such that it computes the same in float32, and written with any
tensor types.
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
# Norm -> matrices that read its output.
_NORM_READERS = {"attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"), "ffn_norm": ("ffn_gate", "ffn_up")}


@dataclass
class Weights:
    """A model in float32."""

    fields: dict[str, tuple[Any, Any, Any]]  # key -> (value, GGUF type, element type of an array)
    tensors: dict[str, Floats]
    types: dict[str, Type]  # tensor types in the file that was read

    @property
    def architecture(self) -> str:
        """general.architecture, the prefix of the model's keys."""
        return str(self.fields["general.architecture"][0])

    def size(self, key: str) -> int:
        """Return the integer value of ARCHITECTURE.key."""
        return int(self.fields[f"{self.architecture}.{key}"][0])

    def set_size(self, key: str, value: int) -> None:
        """Set ARCHITECTURE.key to an integer."""
        self.fields[f"{self.architecture}.{key}"] = (value, gguf.GGUFValueType.UINT32, None)


def read(path: Path) -> Weights:
    """Read a GGUF file; the gguf package dequantises its tensors."""
    reader = gguf.GGUFReader(path)
    fields = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            fields[name] = (field.contents(), field.types[0], field.types[-1] if is_array else None)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    return Weights(fields, tensors, {t.name: t.tensor_type for t in reader.tensors})


def write(weights: Weights, path: Path, types: Mapping[str, Type]) -> Path:
    """Write a GGUF file with the given type for each tensor. Return path."""
    writer = gguf.GGUFWriter(path, weights.architecture)
    for name, (value, kind, sub_kind) in weights.fields.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind, sub_kind)
    for name, values in weights.tensors.items():
        writer.add_tensor(name, quantize(values, types[name]), raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expand(path: Path, target: Path) -> Path:
    """Write a GGUF file dequantised to float32, which every engine computes in float32. Return target."""
    weights = read(path)
    return write(weights, target, dict.fromkeys(weights.types, Type.F32))


def quantize(values: Floats, kind: Type) -> npt.NDArray[Any]:
    """Quantise rows with the gguf package, or with libgguf (ggml's own code) for K-quants."""
    if kind == Type.F32:
        return values
    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(values, kind)
    import libgguf

    return libgguf.quantize_rows(np.ascontiguousarray(values), int(kind))


def plant_outliers(weights: Weights, factor: float, n_channels: int) -> None:
    """Scale n_channels activation channels per layer and matrix input by `factor`, like outliers in large models.

    For the inputs of attention and feed-forward, the norm's weight is multiplied and the columns that read it are
    divided by the factor; for the input of down, the rows of up and the columns of down. In float32 the model computes
    the same; quantised activations lose precision in every block that contains such a channel.
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
    """Pad a `llama` model with zero channels and zero heads until its rows are multiples of a K-quant block.

    Zero channels are spread evenly among the others; zero heads are last. They reduce the mean of squares, so norm
    weights and epsilon are scaled to match: in float32 the model computes the same.
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
        "attn_q": lambda w: _scatter_rows(w, heads, q_width),
        "attn_k": lambda w: _scatter_rows(w, heads[: len(w)], kv_width),
        "attn_v": lambda w: _scatter_rows(w, heads[: len(w)], kv_width),
        "attn_output": lambda w: _scatter_rows(w, channels, width),
        "ffn_down": lambda w: _scatter_rows(w, channels, width),
    }
    for name, values in weights.tensors.items():
        part = name.split(".")[-2]
        if part.endswith("norm"):
            weights.tensors[name] = _scatter_rows(values, channels, width) * np.float32((n_embd / width) ** 0.5)
            continue
        rows = to_rows[part](values) if part in to_rows else values
        if part == "attn_output":
            rows = _scatter_rows(rows.T, heads, q_width).T
        elif part != "ffn_down":
            rows = _scatter_rows(rows.T, channels, width).T
        weights.tensors[name] = rows
    weights.set_size("embedding_length", width)
    weights.set_size("attention.head_count", n_kv_wide * group)
    weights.set_size("attention.head_count_kv", n_kv_wide)
    weights.set_size("attention.key_length", head_dim)
    weights.set_size("attention.value_length", head_dim)
    key = f"{weights.architecture}.attention.layer_norm_rms_epsilon"
    weights.fields[key] = (weights.fields[key][0] * n_embd / width, *weights.fields[key][1:])


def k_quants(weights: Weights) -> dict[str, Type]:
    """Return Phi-3's Q4_K_M tensor types: Q5_K for q, k, v; Q6_K for output and a third of down; Q4_K for the rest."""
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
    """Return Q8_0 for every matrix, F32 for vectors."""
    return {name: Type.F32 if values.ndim == 1 else Type.Q8_0 for name, values in weights.tensors.items()}


def _rounded_up(n: int) -> int:
    return -(-n // _SUPER_BLOCK) * _SUPER_BLOCK


def _scatter_rows(values: Floats, positions: npt.NDArray[np.int64], length: int) -> Floats:
    """Return float32 [length, ...] with the rows of values at the given positions and zeros elsewhere."""
    out = np.zeros((length, *values.shape[1:]), np.float32)
    out[positions] = values
    return out
