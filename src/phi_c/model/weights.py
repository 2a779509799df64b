"""The tensors of a GGUF file as the engine takes them: views of the mapping, fused matrices cut into rows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_c._core import TENSOR_TYPES, Matrix, dequantize
from phi_c.model.config import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, ModelConfig
from phi_c.model.gguf_file import GGUFFile

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerWeights:
    """One layer; matrices are [n_out, n_in], norms [n_embd]."""

    attn_norm: Floats
    wq: Matrix
    wk: Matrix
    wv: Matrix
    wo: Matrix
    ffn_norm: Floats
    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Weights:
    """Everything that a forward pass reads; frequencies are in radians a position, [rope_dims / 2]."""

    token_embd: Matrix
    output_norm: Floats
    output: Matrix
    layers: tuple[LayerWeights, ...]
    rope_inv_freq: Floats
    rope_inv_freq_long: Floats  # beyond the original context; the same for models without LongRoPE
    release: Callable[[], None]  # lets the mapped pages leave memory; they come back when they are read

    def packed_sizes(self, tier: str | None) -> list[int]:
        """Return the bytes that each matrix takes when a tier packs it, 0 where it stays: of the layers, the output."""
        matrices = (m for w in self.layers for m in (w.wq, w.wk, w.wv, w.wo, w.gate, w.up, w.down))
        return [m.packed_bytes(tier) for m in (*matrices, self.output)]


def load_weights(file: GGUFFile, config: ModelConfig) -> Weights:
    """Return the weights of a file that `read_config` accepted; matrices are views that keep it mapped."""
    embedding = _rows(file, "token_embd.weight")
    return Weights(
        token_embd=embedding,
        output_norm=_vector(file, "output_norm.weight"),
        output=_rows(file, "output.weight") if "output.weight" in file.tensors else embedding,
        layers=tuple(_layer(file, config, i) for i in range(config.n_layers)),
        rope_inv_freq=_inv_freq(file, config, ROPE_SHORT),
        rope_inv_freq_long=_inv_freq(file, config, ROPE_LONG),
        release=file.release,
    )


def _layer(file: GGUFFile, config: ModelConfig, index: int) -> LayerWeights:
    block = f"blk.{index}."
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if config.fused_qkv:
        wq, wk, wv = _cut(file, block + "attn_qkv.weight", q_rows, kv_rows, kv_rows)
    else:
        wq, wk, wv = (_rows(file, f"{block}attn_{name}.weight") for name in "qkv")
    if config.fused_gate_up:
        gate, up = _cut(file, block + "ffn_up.weight", config.n_ffn, config.n_ffn)
    else:
        gate, up = _rows(file, block + "ffn_gate.weight"), _rows(file, block + "ffn_up.weight")
    return LayerWeights(
        attn_norm=_vector(file, block + "attn_norm.weight"),
        wq=wq,
        wk=wk,
        wv=wv,
        wo=_rows(file, block + "attn_output.weight"),
        ffn_norm=_vector(file, block + "ffn_norm.weight"),
        gate=gate,
        up=up,
        down=_rows(file, block + "ffn_down.weight"),
    )


def _rows(file: GGUFFile, name: str) -> Matrix:
    (matrix,) = _cut(file, name, file.tensors[name].shape[0])
    return matrix


def _cut(file: GGUFFile, name: str, *row_counts: int) -> list[Matrix]:
    """Cut a matrix into matrices of so many rows each: quantised blocks never cross a row."""
    info = file.tensors[name]
    data = file.data(name)
    row_bytes = info.n_bytes // info.shape[0]
    matrices, first = [], 0
    for n_rows in row_counts:
        view = data[first * row_bytes : (first + n_rows) * row_bytes]
        matrices.append(Matrix(info.type_id, n_rows, info.shape[1], view))
        first += n_rows
    return matrices


def _vector(file: GGUFFile, name: str) -> Floats:
    info = file.tensors[name]
    return dequantize(info.type_id, file.data(name), info.n_bytes // TENSOR_TYPES[info.type_id].block_bytes)


def _inv_freq(file: GGUFFile, config: ModelConfig, factors: str) -> Floats:
    """Return base^(-2 i / rope_dims) over the file's factors, in float32 as transformers computes it."""
    exponents = np.arange(0, config.rope_dims, 2, dtype=np.float32) / np.float32(config.rope_dims)
    inv_freq = (1.0 / np.float32(config.rope_freq_base) ** exponents).astype(np.float32)
    for name in (factors, ROPE_FREQS):
        if name in file.tensors:
            inv_freq /= _vector(file, name)
    scaled: Floats = inv_freq / np.float32(config.rope_scale)
    return scaled
