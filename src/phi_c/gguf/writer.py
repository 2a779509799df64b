"""Writes GGUF files: a `Plan` fixes header and size before the first byte is written, `write` streams tensor data.

Version 3 of ggml's docs/gguf.md, little endian.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import IO, TypeAlias

import numpy as np

from phi_c.gguf.types import (
    DEFAULT_ALIGNMENT,
    DTYPES,
    MAGIC,
    MAX_DIMS,
    SCALARS,
    TENSOR_TYPES_BY_NAME,
    UINT32,
    UINT64,
    WRITE_VERSION,
    ValueType,
)

EncodedValue: TypeAlias = bytes  # a metadata value as stored: its type, then its content
Chunk: TypeAlias = bytes | memoryview  # part of a tensor's data
Progress: TypeAlias = Callable[[int, int], object]  # called with the bytes written and the bytes of the whole file


def u32(value: int) -> EncodedValue:
    """Encode an unsigned 32-bit integer."""
    return _scalar(ValueType.UINT32, value)


def f32(value: float) -> EncodedValue:
    """Encode a 32-bit float."""
    return _scalar(ValueType.FLOAT32, value)


def boolean(value: bool) -> EncodedValue:
    """Encode a bool."""
    return _scalar(ValueType.BOOL, value)


def string(value: str) -> EncodedValue:
    """Encode a string as UTF-8. Lone surrogates, which occur in file names that are not UTF-8, become '?'."""
    return UINT32.pack(ValueType.STRING) + _string(value)


def strings(values: Sequence[str]) -> EncodedValue:
    """Encode an array of strings."""
    return _array(ValueType.STRING, len(values), b"".join(map(_string, values)))


def i32_array(values: Sequence[int]) -> EncodedValue:
    """Encode an array of signed 32-bit integers."""
    return _array(ValueType.INT32, len(values), np.array(values, DTYPES[ValueType.INT32]).tobytes())


def f32_array(values: Sequence[float]) -> EncodedValue:
    """Encode an array of 32-bit floats."""
    return _array(ValueType.FLOAT32, len(values), np.array(values, DTYPES[ValueType.FLOAT32]).tobytes())


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file that is to be written.

    shape is row-major: (n_rows, n_cols) for a matrix. type_name: a row of TENSOR_TYPES, such as Q4_K.
    Raises ValueError for more than 4 dimensions, or rows that are not a multiple of the type's block.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= MAX_DIMS:
            raise ValueError(f"{self.name} has {len(self.shape)} dimensions, expected 1 to {MAX_DIMS}")
        block_elements = TENSOR_TYPES_BY_NAME[self.type_name].block_elements
        if self.shape[-1] % block_elements:
            raise ValueError(
                f"{self.name} has rows of {self.shape[-1]} elements, expected a multiple of {block_elements} "
                f"({self.type_name})"
            )

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the data in bytes, without padding."""
        tensor_type = TENSOR_TYPES_BY_NAME[self.type_name]
        return self.n_elements // tensor_type.block_elements * tensor_type.block_bytes


@dataclass(frozen=True)
class Plan:
    """Everything a GGUF file contains except its tensor data.

    metadata: encoded values by key, from the functions above or from GGUFFile.raw_metadata. tensors: in file order.
    alignment: of each tensor's data, in bytes; other than 32, metadata must hold it as general.alignment.
    """

    metadata: Mapping[str, EncodedValue]
    tensors: tuple[TensorSpec, ...]
    alignment: int = DEFAULT_ALIGNMENT

    @cached_property
    def header(self) -> bytes:
        """Everything before the tensor data, padded to the alignment."""
        parts = [MAGIC, UINT32.pack(WRITE_VERSION), UINT64.pack(len(self.tensors)), UINT64.pack(len(self.metadata))]
        parts += [_string(key) + value for key, value in self.metadata.items()]
        offset = 0
        for tensor in self.tensors:
            parts += [_string(tensor.name), UINT32.pack(len(tensor.shape)), *map(UINT64.pack, reversed(tensor.shape))]
            parts += [UINT32.pack(TENSOR_TYPES_BY_NAME[tensor.type_name].type_id), UINT64.pack(offset)]
            offset += self._padded(tensor.n_bytes)
        header = b"".join(parts)
        return header.ljust(self._padded(len(header)), b"\0")

    @cached_property
    def n_bytes(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + sum(self._padded(tensor.n_bytes) for tensor in self.tensors)

    def _padded(self, n_bytes: int) -> int:
        return -(-n_bytes // self.alignment) * self.alignment


def write(
    file: IO[bytes],
    plan: Plan,
    data: Iterable[Iterable[Chunk]],
    progress: Progress = lambda n_written, n_total: None,
) -> None:
    """Write a GGUF file; memory use is that of one chunk.

    data: for each tensor of the plan, in its order, the chunks of its data; both levels are consumed lazily.
    progress: called after each chunk and at the end.

    Raises ValueError if the chunks of a tensor are not exactly TensorSpec.n_bytes, or data is not one per tensor.
    """
    file.write(plan.header)
    n_written = len(plan.header)
    for tensor, chunks in zip(plan.tensors, data, strict=True):
        n_data = 0
        for chunk in chunks:
            n_data += memoryview(chunk).nbytes
            file.write(chunk)
            progress(n_written + n_data, plan.n_bytes)
        if n_data != tensor.n_bytes:
            raise ValueError(f"{tensor.name} has {n_data} bytes of data, expected {tensor.n_bytes}")
        file.write(bytes(-n_data % plan.alignment))
        n_written += n_data + -n_data % plan.alignment
    progress(n_written, plan.n_bytes)


def _scalar(value_type: ValueType, value: float) -> EncodedValue:
    return UINT32.pack(value_type) + SCALARS[value_type].pack(value)


def _array(element_type: ValueType, n_elements: int, content: bytes) -> EncodedValue:
    return UINT32.pack(ValueType.ARRAY) + UINT32.pack(element_type) + UINT64.pack(n_elements) + content


def _string(value: str) -> bytes:
    raw = value.encode("utf-8", "replace")
    return UINT64.pack(len(raw)) + raw
