"""The weights of a GGUF file as `_core.Model` takes them: matrices are views of the mapped file.

Fused matrices (attn_qkv, ffn_up of phi3, expert tensors) are split by rows, which copies nothing.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_c._core import TENSOR_TYPES, Matrix, dequantize
from phi_c.gguf.reader import GGUFFile
from phi_c.model.config import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, ModelConfig

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Norm:
    """A norm's float32 [n_embd] weight and bias; bias: None for RMSNorm."""

    weight: Floats
    bias: Floats | None


@dataclass(frozen=True)
class FeedForward:
    """gate and up are [n_ffn, n_embd], down is [n_embd, n_ffn]; gate: None with gelu."""

    gate: Matrix | None
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class LayerWeights:
    """One layer; matrices are [n_out, n_in]. ffn_norm: None for architectures with a parallel feed-forward."""

    attn_norm: Norm
    wq: Matrix
    wk: Matrix
    wv: Matrix
    wo: Matrix
    ffn_norm: Norm | None
    router: Matrix | None  # [n_experts, n_embd]; None without experts
    ffn: tuple[FeedForward, ...]  # one per expert; without experts, one

    @property
    def packable(self) -> list[Matrix | None]:
        """The matrices that a tier may pack, in the order of the panels in memory."""
        return [self.wq, self.wk, self.wv, self.wo, *(m for f in self.ffn for m in (f.gate, f.up, f.down))]


@dataclass(frozen=True)
class Weights:
    """Everything that a forward pass reads; frequencies are in radians per position, float32 [rope_dims / 2]."""

    token_embd: Matrix
    output_norm: Norm
    output: Matrix
    layers: tuple[LayerWeights, ...]
    rope_inv_freq: Floats
    rope_inv_freq_long: Floats  # beyond the original context; equal to rope_inv_freq without LongRoPE
    file: GGUFFile | None  # that the matrices are views of; None: they are in memory

    def packed_sizes(self, tier: str | None) -> list[int]:
        """Return the packed bytes of each matrix of the layers and of the output; 0: the tier does not pack it."""
        matrices = [m for layer in self.layers for m in layer.packable]
        return [m.packed_bytes(tier) if m is not None else 0 for m in (*matrices, self.output)]


def load_weights(file: GGUFFile, config: ModelConfig) -> Weights:
    """Return the weights of a file that `read_config` accepted; the matrices are views that keep it mapped."""
    embedding = _matrix(file, "token_embd")
    bias = _vector(file, "output.bias") if config.output_bias else None
    output = "output" if "output.weight" in file.tensors else "token_embd"
    return Weights(
        token_embd=embedding,
        output_norm=_norm(file, config, "output_norm"),
        output=_split_rows(file, output, file.tensors[f"{output}.weight"].shape[0], bias=bias)[0],
        layers=tuple(_layer(file, config, i) for i in range(config.n_layers)),
        rope_inv_freq=_inv_freq(file, config, ROPE_SHORT),
        rope_inv_freq_long=_inv_freq(file, config, ROPE_LONG),
        file=file,
    )


def _layer(file: GGUFFile, config: ModelConfig, index: int) -> LayerWeights:
    block = f"blk.{index}."
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if config.fused_qkv:
        wq, wk, wv = _split_rows(file, block + "attn_qkv", q_rows, kv_rows, kv_rows, row_unit=config.head_dim)
    else:
        wq, wk, wv = (_matrix(file, f"{block}attn_{name}", row_unit=config.head_dim) for name in "qkv")
    return LayerWeights(
        attn_norm=_norm(file, config, block + "attn_norm"),
        wq=wq,
        wk=wk,
        wv=wv,
        wo=_matrix(file, block + "attn_output"),
        ffn_norm=None if config.parallel else _norm(file, config, block + "ffn_norm"),
        router=_matrix(file, block + "ffn_gate_inp") if config.n_experts else None,
        ffn=_experts(file, config, block) if config.n_experts else (_feed_forward(file, config, block),),
    )


def _feed_forward(file: GGUFFile, config: ModelConfig, block: str) -> FeedForward:
    gate: Matrix | None = None
    if config.fused_gate_up:
        gate, up = _split_rows(file, block + "ffn_up", config.n_ffn, config.n_ffn)
    else:
        gate = _matrix(file, block + "ffn_gate") if config.activation == "swiglu" else None
        up = _matrix(file, block + "ffn_up")
    return FeedForward(gate, up, _matrix(file, block + "ffn_down"))


def _experts(file: GGUFFile, config: ModelConfig, block: str) -> tuple[FeedForward, ...]:
    rows = {"gate": config.n_ffn, "up": config.n_ffn, "down": config.n_embd}
    parts = [_split_rows(file, f"{block}ffn_{name}_exps", *[n] * config.n_experts) for name, n in rows.items()]
    return tuple(FeedForward(*matrices) for matrices in zip(*parts, strict=True))


def _norm(file: GGUFFile, config: ModelConfig, name: str) -> Norm:
    return Norm(_vector(file, name + ".weight"), _vector(file, name + ".bias") if config.norm == "layer" else None)


def _matrix(file: GGUFFile, name: str, row_unit: int = 0) -> Matrix:
    (matrix,) = _split_rows(file, name, file.tensors[name + ".weight"].shape[0], row_unit=row_unit)
    return matrix


def _split_rows(
    file: GGUFFile, name: str, *row_counts: int, row_unit: int = 0, bias: Floats | None = None
) -> list[Matrix]:
    """Split a tensor by rows into matrices; quantisation blocks never cross a row.

    row_counts: rows of each matrix.
    row_unit: products are computed in multiples of this many rows, those of a head; 0: in any number of rows.
    bias: float32 [n_rows] of the whole tensor; None: NAME.bias if the file has it.
    """
    info = file.tensors[name + ".weight"]
    data = file.data(name + ".weight")
    n_cols = info.shape[-1]
    row_bytes = info.n_bytes // math.prod(info.shape[:-1])
    if bias is None and name + ".bias" in file.tensors:
        bias = _vector(file, name + ".bias")
    matrices, start = [], 0
    for n_rows in row_counts:
        view = data[start * row_bytes : (start + n_rows) * row_bytes]
        part = None if bias is None else bias[start : start + n_rows]
        matrices.append(Matrix(info.type_id, n_rows, n_cols, view, bias=part, row_unit=row_unit))
        start += n_rows
    return matrices


def _vector(file: GGUFFile, name: str) -> Floats:
    info = file.tensors[name]
    return dequantize(info.type_id, file.data(name), info.n_bytes // TENSOR_TYPES[info.type_id].block_bytes)


def _inv_freq(file: GGUFFile, config: ModelConfig, factors: str) -> Floats:
    """Return base^(-2 i / rope_dims) divided by the file's factors and rope_scale, in float32 as transformers does."""
    exponents = np.arange(0, config.rope_dims, 2, dtype=np.float32) / np.float32(config.rope_dims)
    inv_freq = (1.0 / np.float32(config.rope_freq_base) ** exponents).astype(np.float32)
    for name in (factors, ROPE_FREQS):
        if name in file.tensors:
            inv_freq /= _vector(file, name)
    scaled: Floats = inv_freq / np.float32(config.rope_scale)
    return scaled
