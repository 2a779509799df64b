"""Constants of the GGUF byte layout, shared by the reader and the writer (ggml's docs/gguf.md, little endian)."""

import enum
import struct
from typing import Any

import numpy as np

from phi_c._core import TENSOR_TYPES

MAGIC = b"GGUF"
READ_VERSIONS = (2, 3)
WRITE_VERSION = 3
DEFAULT_ALIGNMENT = 32  # bytes, of a file without general.alignment
MAX_DIMS = 4


class ValueType(enum.IntEnum):
    """Type of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7  # one byte, 0 or 1
    STRING = 8  # UINT64 length in bytes, UTF-8
    ARRAY = 9  # UINT32 element type, UINT64 element count, elements without their types
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALARS: dict[int, struct.Struct] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<B"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
DTYPES: dict[int, np.dtype[Any]] = {  # of arrays
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("<u1"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
UINT32, UINT64 = SCALARS[ValueType.UINT32], SCALARS[ValueType.UINT64]

TENSOR_TYPES_BY_NAME = {tensor_type.name: tensor_type for tensor_type in TENSOR_TYPES.values()}
