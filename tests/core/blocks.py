"""Rows of quantised blocks for kernel tests: every byte random, or every byte at an extreme."""

import numpy as np
import numpy.typing as npt

from phi_c._core import TENSOR_TYPES, TensorType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

TYPES = {t.name: t for t in TENSOR_TYPES.values()}
QUANTISED = [t.name for t in TENSOR_TYPES.values() if t.quantised_activations]

# Where the half precision scales of a block lie, in bytes from its start (GGUF specification).
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

# Where quants lie in a block, and the bytes that make the least and the largest of them.
QUANT_BYTES = {
    "Q4_0": (slice(2, 18), 0x00, 0xFF),
    "Q4_1": (slice(4, 20), 0x00, 0xFF),
    "Q8_0": (slice(2, 34), 0x80, 0x7F),
    "Q4_K": (slice(16, 144), 0x00, 0xFF),
    "Q5_K": (slice(16, 176), 0x00, 0xFF),
    "Q6_K": (slice(0, 192), 0x00, 0xFF),
}


def set_quants(rows: Bytes, kind: TensorType, *, largest: bool) -> Bytes:
    """Return a copy of the rows whose quants are all the largest, or the least, of the type."""
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
    """Return uint8 [n_rows, row_bytes]: any quants and sub-block scales, block scales of a sane size."""
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
    """Return one row for each repeated byte that stretches a field to its end, with scales of both signs."""
    kind = TYPES[name]
    row_bytes = n_cols // kind.block_elements * kind.block_bytes
    rows = np.repeat(np.array([0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F, 0x55, 0xAA], np.uint8), row_bytes).reshape(8, -1)
    signs = np.where(np.arange(8) % 2, -1.0, 1.0).astype(np.float16)[:, None]
    return set_scales(rows, kind, signs * np.float16(0.5))


def spiky(n_tokens: int, n_cols: int, rng: np.random.Generator) -> Floats:
    """Return activations as models make them: mostly small, a few channels a hundred times larger."""
    x = rng.normal(size=(n_tokens, n_cols)).astype(np.float32)
    x[:, rng.integers(0, n_cols, max(1, n_cols // 100))] *= 100
    return x
