"""Rows of quantised blocks for kernel tests: random bytes, or extreme values of every field."""

import numpy as np
import numpy.typing as npt

from phi_c._core import TENSOR_TYPES, TensorType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

TYPES = {t.name: t for t in TENSOR_TYPES.values()}
QUANTISED = [t.name for t in TENSOR_TYPES.values() if t.quantised_activations]

# Offsets of the half-precision scales in a block, in bytes (GGUF specification).
SCALE_OFFSETS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}

# Byte range of the quants in a block, and the bytes of the smallest and of the largest quant.
QUANT_BYTES = {
    "Q4_0": (slice(2, 18), 0x00, 0xFF),
    "Q4_1": (slice(4, 20), 0x00, 0xFF),
    "Q8_0": (slice(2, 34), 0x80, 0x7F),
    "Q4_K": (slice(16, 144), 0x00, 0xFF),
    "Q5_K": (slice(16, 176), 0x00, 0xFF),
    "Q6_K": (slice(0, 192), 0x00, 0xFF),
}


def set_quants(rows: Bytes, kind: TensorType, *, largest: bool) -> Bytes:
    """Return a copy of the rows whose quants all are the largest, or the smallest, of the type."""
    where, low, high = QUANT_BYTES[kind.name]
    blocks = rows.copy().reshape(rows.shape[0], -1, kind.block_bytes)
    blocks[:, :, where] = high if largest else low
    return blocks.reshape(rows.shape)


def set_scales(rows: Bytes, kind: TensorType, scales: npt.NDArray[np.float16]) -> Bytes:
    """Overwrite every block's scales: rows [n_rows, row_bytes], scales broadcast to [n_rows, n_blocks]."""
    blocks = rows.reshape(rows.shape[0], -1, kind.block_bytes)
    raw = np.ascontiguousarray(np.broadcast_to(scales, blocks.shape[:2])).view(np.uint8)
    for offset in SCALE_OFFSETS[kind.name]:
        blocks[:, :, offset : offset + 2] = raw.reshape(*blocks.shape[:2], 2)
    return rows


def random_rows(name: str, n_rows: int, n_cols: int, rng: np.random.Generator) -> Bytes:
    """Return uint8 [n_rows, row_bytes]: random quants and sub-block scales, moderate block scales."""
    kind = TYPES[name]
    if not kind.quantised_activations:
        values = rng.normal(size=(n_rows, n_cols)).astype(np.float32)
        if name == "F16":
            return values.astype(np.float16).view(np.uint8)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.view(np.uint8)
    row_bytes = n_cols // kind.block_elements * kind.block_bytes
    rows = rng.integers(0, 256, (n_rows, row_bytes), dtype=np.uint8)
    n_blocks = n_cols // kind.block_elements
    return set_scales(rows, kind, rng.normal(0, 0.01, (n_rows, n_blocks)).astype(np.float16))


def extreme_rows(name: str, n_cols: int) -> Bytes:
    """Return 8 rows, each of one repeated byte that gives fields extreme values, with scales of both signs."""
    kind = TYPES[name]
    row_bytes = n_cols // kind.block_elements * kind.block_bytes
    rows = np.repeat(np.array([0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F, 0x55, 0xAA], np.uint8), row_bytes).reshape(8, -1)
    signs = np.where(np.arange(8) % 2, -1.0, 1.0).astype(np.float16)[:, None]
    return set_scales(rows, kind, signs * np.float16(0.5))


def spiky(n_tokens: int, n_cols: int, rng: np.random.Generator) -> Floats:
    """Return activations with outlier channels, as models have them: 1 % of the columns are 100 times larger."""
    x = rng.normal(size=(n_tokens, n_cols)).astype(np.float32)
    x[:, rng.integers(0, n_cols, max(1, n_cols // 100))] *= 100
    return x
