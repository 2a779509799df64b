"""The float types of safetensors and GGUF files, and the casts between them."""

from typing import Any

import numpy as np
import numpy.typing as npt

OUT_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}

# NumPy type of each float type. NumPy has no bfloat16, so BF16 is stored as its bits.
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def cast(values: npt.NDArray[Any], source: str, target: str) -> npt.NDArray[Any]:
    """Return values cast from one type of DTYPES to another, rounded to nearest even; BF16 values are uint16 bits.

    Raises OverflowError if a finite value would become infinite.
    """
    if source == target:
        return values
    floats = _from_bf16(values) if source == "BF16" else values.astype(np.float32, copy=False)
    if target == "F32":
        return floats
    with np.errstate(over="ignore"):
        rounded = _to_bf16(floats) if target == "BF16" else floats.astype(np.float16)
    back = _from_bf16(rounded) if target == "BF16" else rounded
    if (np.isfinite(floats) & ~np.isfinite(back)).any():
        raise OverflowError
    return rounded


def _from_bf16(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(floats: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(floats).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could turn a NaN into infinity, so NaNs are truncated to quiet NaNs instead.
    return np.where(np.isnan(floats), (bits >> 16) | 0x40, rounded).astype(np.uint16)
