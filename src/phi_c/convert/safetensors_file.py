"""Reads safetensors files: the validated header, and ranges of rows as stored.

File: header size [8 bytes, little endian], JSON header, tensor data. Format: github.com/huggingface/safetensors,
"Format". The `safetensors` package returns bfloat16 only as PyTorch tensors and does not expose data offsets, so phi-c
parses the header itself.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi_c.convert.values import DTYPES
from phi_c.errors import ModelFileError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; dtype is the format's name, and only the types in DTYPES can be read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int  # bytes from the start of the file

    @property
    def row_elements(self) -> int:
        """Elements per row; a one-dimensional tensor has one element per row."""
        return math.prod(self.shape[1:])

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows start to stop - 1, [stop - start, row_elements], BF16 as uint16.

        Raises ModelFileError if the file cannot be read or was truncated after its header was read.
        """
        dtype = DTYPES[self.dtype]
        row_bytes = self.row_elements * dtype.itemsize
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + start * row_bytes)
                raw = file.read((stop - start) * row_bytes)
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if len(raw) != (stop - start) * row_bytes:
            raise ModelFileError(f"{self.path}: the file ends inside tensor {self.name!r}: truncated")
        values: npt.NDArray[Any] = np.frombuffer(raw, dtype)
        return values.reshape(stop - start, self.row_elements)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name; raises ModelFileError if it is corrupt or not a safetensors file."""
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if n_bytes < 8 or n_header > min(n_bytes - 8, MAX_HEADER_BYTES):
                raise ModelFileError(f"{path}: the header is truncated, or this is not a safetensors file")
            header = json.loads(file.read(n_header))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ModelFileError(f"{path}: the header is not valid JSON: corrupt, or not a safetensors file") from None
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: the header is a {type(header).__name__}, expected a JSON object")
    start = 8 + n_header
    return {
        name: _tensor(path, name, entry, start, n_bytes - start)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _tensor(path: Path, name: str, entry: Any, start: int, data_bytes: int) -> StoredTensor:
    """Return the tensor of a header entry; start: offset of the tensor data, which has data_bytes bytes."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not _is_list_of_counts(shape)
        or not _is_list_of_counts(offsets)
        or len(offsets) != 2
    ):
        raise ModelFileError(f"{path}: the header entry of {name!r:.80} is corrupt")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise ModelFileError(f"{path}: tensor {name!r} ends beyond the end of the file: truncated")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ModelFileError(
            f"{path}: tensor {name!r} has {end - begin} bytes, expected "
            f"{math.prod(shape) * DTYPES[dtype].itemsize} for {dtype} {shape}"
        )
    return StoredTensor(name, dtype, tuple(shape), path, start + begin)


def _is_list_of_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)
