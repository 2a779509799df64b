"""Reads safetensors files: the header, checked, and ranges of rows as they are stored.

Format: github.com/huggingface/safetensors, "Format". The `safetensors` package hands out bfloat16 to PyTorch alone and
says nothing of where tensors lie, so the 8 bytes and the JSON in front of them are read here.
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
    """A tensor in a file; dtype is the format's own name, of which only those in DTYPES can be read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int  # bytes from the file's begin

    @property
    def row_elements(self) -> int:
        """Elements of a row; a one-dimensional tensor has rows of one."""
        return math.prod(self.shape[1:])

    def rows(self, first: int, last: int) -> npt.NDArray[Any]:
        """Return rows first..last-1, [last - first, row_elements], BF16 as uint16.

        Raises ModelFileError when the file has become shorter.
        """
        dtype = DTYPES[self.dtype]
        row_bytes = self.row_elements * dtype.itemsize
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + first * row_bytes)
                raw = file.read((last - first) * row_bytes)
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if len(raw) != (last - first) * row_bytes:
            raise ModelFileError(f"{self.path}: the file ends within the tensor {self.name!r}")
        values: npt.NDArray[Any] = np.frombuffer(raw, dtype)
        return values.reshape(last - first, self.row_elements)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name; raises ModelFileError when it is damaged or no safetensors file."""
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if n_bytes < 8 or n_header > min(n_bytes - 8, MAX_HEADER_BYTES):
                raise ModelFileError(f"{path}: the header is cut off, or this is no safetensors file")
            header = json.loads(file.read(n_header))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ModelFileError(f"{path}: the header is no JSON: damaged, or no safetensors file") from None
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: the header is a {type(header).__name__}, expected an object")
    start = 8 + n_header
    return {
        name: _tensor(path, name, entry, start, n_bytes - start)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _tensor(path: Path, name: str, entry: Any, start: int, n_data: int) -> StoredTensor:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ModelFileError(f"{path}: the header's entry of {name!r:.80} is damaged")
    begin, end = offsets
    if not begin <= end <= n_data:
        raise ModelFileError(f"{path}: the tensor {name!r} lies outside the file: truncated")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ModelFileError(
            f"{path}: the tensor {name!r} has {end - begin} bytes, which is not what {dtype} {shape} takes"
        )
    return StoredTensor(name, dtype, tuple(shape), path, start + begin)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)
