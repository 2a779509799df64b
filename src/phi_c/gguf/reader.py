"""Reads GGUF files: the file is memory-mapped and every header field is checked against the file's size.

Versions 2 and 3 of ggml's docs/gguf.md, little endian.
"""

import contextlib
import errno
import hashlib
import mmap
import os
import stat
import struct
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from phi_c._core import TENSOR_TYPES, read_strings
from phi_c.errors import ModelClosedError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from phi_c.gguf.types import (
    DEFAULT_ALIGNMENT,
    DTYPES,
    MAGIC,
    MAX_DIMS,
    READ_VERSIONS,
    SCALARS,
    UINT32,
    UINT64,
    ValueType,
)

MetadataValue: TypeAlias = bool | int | float | str | list[str] | npt.NDArray[Any] | list["MetadataValue"]

# Smallest size of each kind of entry: a count above (bytes left) / (smallest size) is wrong.
_MIN_STRING_BYTES = 8  # length
_MIN_ARRAY_BYTES = 12  # element type, count
_MIN_KEY_BYTES = 13  # key length, value type, one-byte value
_MIN_TENSOR_BYTES = 32  # name length, n_dims, one dimension, type, offset

# Limits far above any published file. In a file of several gigabytes, a corrupt count or length can fit the file and
# would cost gigabytes of memory before the corruption is detected.
_MAX_ITEMS = 1 << 24
_MAX_NESTED_ARRAYS = 1 << 16
_MAX_DEPTH = 4

# The samples of tensor data that `identity` hashes.
_N_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class TensorInfo:
    """Name, type, shape and position of one tensor.

    shape is row-major: (n_rows, n_cols) for a matrix. GGUF stores the reverse.
    """

    name: str
    type_id: int  # key of TENSOR_TYPES
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    n_bytes: int

    @property
    def type_name(self) -> str:
        """Name of the tensor's type, such as Q4_K."""
        return TENSOR_TYPES[self.type_id].name


class GGUFFile:
    """A GGUF file mapped read-only into memory. A context manager.

    The whole header is checked when the file is opened, so `data` never reads outside the file.

    Raises ModelNotFoundError if the file does not exist, ModelFileError if it cannot be read, is corrupt or is not a
    GGUF file, UnsupportedModelError for a tensor type that phi-c does not support and for a split file.
    """

    path: Path
    version: int
    alignment: int  # bytes
    metadata: dict[str, MetadataValue]  # numeric arrays are read-only ndarrays
    tensors: dict[str, TensorInfo]  # in file order
    n_bytes: int  # of the whole file
    data_offset: int  # start of the tensor data, in bytes from the start of the file

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        mapping, fd, self._modified_ns = _map_file(self.path)
        self._map: mmap.mmap | None = mapping
        self._fd = fd
        self._close_fd = weakref.finalize(self, os.close, fd)
        self.n_bytes = len(mapping)
        try:
            self._read_header(_Cursor(mapping, self.path))
        except BaseException:
            self.close()
            raise

    def _read_header(self, cursor: "_Cursor") -> None:
        self.version = _read_version(cursor)
        n_tensors = cursor.count("the number of tensors", 0)
        n_keys = cursor.count("the number of metadata keys", _MIN_KEY_BYTES)
        self.metadata, self._value_spans = _read_metadata(cursor, n_keys)
        self.alignment = _alignment(self.metadata, self.path)
        _reject_split(self.metadata, self.path)
        cursor.check_count(n_tensors, "the number of tensors", _MIN_TENSOR_BYTES)
        entries = [_read_tensor_entry(cursor) for _ in range(n_tensors)]
        self.data_offset = -(-cursor.offset // self.alignment) * self.alignment
        self.tensors = _place_tensors(entries, self.data_offset, self.alignment, self.n_bytes, self.path)

    def raw_metadata(self) -> dict[str, bytes]:
        """Return each key's value as stored, preceded by its type; raises ModelClosedError after `close`."""
        mapping = self._mapping()
        return {key: mapping[start:end] for key, (start, end) in self._value_spans.items()}

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the data of one tensor: uint8 [n_bytes], a read-only view of the mapping.

        Raises ModelFileError if the file has no such tensor, ModelClosedError after `close`.
        """
        mapping = self._mapping()
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.path}: the file has no tensor {short(name)}")
        return np.frombuffer(mapping, np.uint8, info.n_bytes, info.offset)

    def all_data(self) -> npt.NDArray[np.uint8]:
        """Return the data of all tensors, including padding: uint8, a read-only view of the mapping.

        Raises ModelClosedError after `close`.
        """
        return np.frombuffer(self._mapping(), np.uint8)[self.data_offset :]

    def identity(self) -> bytes:
        """Return a SHA-256 digest that identifies this version of the file, without hashing all of its data.

        It covers size, modification time, header and samples of the tensor data. The samples tell apart files of the
        same size and header that were copied with their modification time. Raises ModelClosedError after `close`.
        """
        mapping = self._mapping()
        digest = hashlib.sha256(f"{self.n_bytes} {self._modified_ns} ".encode())
        digest.update(mapping[: self.data_offset])
        for i in range(_N_SAMPLES):
            start = self.data_offset + (self.n_bytes - self.data_offset) * i // _N_SAMPLES
            digest.update(mapping[start : start + _SAMPLE_BYTES])
        return digest.digest()

    def fileno(self) -> int:
        """Return the descriptor of the open file; raises ModelClosedError after `close`."""
        self._mapping()
        return self._fd

    def release(self) -> None:
        """Drop the mapped pages from this process's resident memory; the OS page cache keeps them."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the file. Views returned by `data` stay valid and keep the mapping alive."""
        self._close_fd()
        mapping, self._map = self._map, None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # views exist: the file is unmapped when the last one is freed
                mapping.close()

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            raise ModelClosedError(f"{self.path}: the file was closed")
        return self._map

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Cursor:
    """Reads the header front to back; raises ModelFileError instead of reading past the end of the file."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.size = len(buffer)
        self.offset = 0

    def error(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {message}")

    def require(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.offset:
            raise self.error(
                f"the file is truncated or corrupt: {what} needs {n_bytes} bytes at offset {self.offset}, "
                f"the file has {self.size} bytes"
            )

    def unpack(self, field: struct.Struct, what: str) -> Any:
        self.require(field.size, what)
        (value,) = field.unpack_from(self.buffer, self.offset)
        self.offset += field.size
        return value

    def count(self, what: str, item_bytes: int, max_count: int | None = None) -> int:
        value: int = self.unpack(UINT64, what)
        self.check_count(value, what, item_bytes, max_count)
        return value

    def check_count(self, value: int, what: str, item_bytes: int, max_count: int | None = None) -> None:
        n_left = self.size - self.offset
        if value * item_bytes > n_left:
            raise self.error(
                f"the file is truncated or corrupt: {what} is {value}, which needs at least {value * item_bytes} bytes "
                f"at offset {self.offset}, the file has {n_left} bytes left"
            )
        if max_count is not None and value > max_count:
            raise self.error(f"{what} is {value}, expected at most {max_count}")

    def string(self, what: str) -> str:
        n_bytes = self.count(f"the length of {what}", 1, _MAX_ITEMS)
        raw = self.buffer[self.offset : self.offset + n_bytes]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            offset = self.offset + error.start
            raise self.error(f"{what} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {offset}") from None
        self.offset += n_bytes
        return text

    def value(self, what: str) -> MetadataValue:
        type_id = self.unpack(UINT32, f"the value type of {what}")
        if type_id == ValueType.STRING:
            return self.string(what)
        if type_id == ValueType.ARRAY:
            return self.array(what, 1)
        if type_id not in SCALARS:
            raise self.error(f"{what} has the unknown value type {type_id}, expected 0 to 12")
        value: bool | int | float = self.unpack(SCALARS[type_id], what)
        if type_id == ValueType.BOOL:
            if value not in (0, 1):
                raise self.error(f"{what} is a bool, expected the byte 0 or 1, found {value}")
            return bool(value)
        return value

    def array(self, what: str, depth: int) -> MetadataValue:
        type_id = self.unpack(UINT32, f"the element type of {what}")
        count_name = f"the element count of {what}"
        if type_id == ValueType.STRING:
            return self.strings(what, self.count(count_name, _MIN_STRING_BYTES, _MAX_ITEMS))
        if type_id == ValueType.ARRAY:
            if depth == _MAX_DEPTH:
                raise self.error(f"{what} nests arrays more than {_MAX_DEPTH} deep")
            n_arrays = self.count(count_name, _MIN_ARRAY_BYTES, _MAX_NESTED_ARRAYS)
            return [self.array(what, depth + 1) for _ in range(n_arrays)]
        if type_id not in DTYPES:
            raise self.error(f"{what} has the unknown element type {type_id}, expected 0 to 12")
        dtype = DTYPES[type_id]
        n_items = self.count(count_name, dtype.itemsize, _MAX_ITEMS)
        # Copied, since a view would keep the mapping open for the lifetime of the metadata.
        values = np.frombuffer(self.buffer, dtype, n_items, self.offset).copy() if n_items else np.empty(0, dtype)
        if type_id == ValueType.BOOL:
            if n_items and values.max() > 1:
                raise self.error(f"{what} holds bools, expected bytes 0 or 1, found {values.max()}")
            values = values.view(np.bool_)
        values.flags.writeable = False
        self.offset += n_items * dtype.itemsize
        return values

    def strings(self, what: str, count: int) -> list[str]:
        try:
            strings, self.offset = read_strings(self.buffer, self.offset, count)
        except ValueError as error:
            raise self.error(f"{what} is not an array of {count} strings: {error}") from None
        return strings


def _map_file(path: Path) -> tuple[mmap.mmap, int, int]:
    """Return the mapping, a descriptor, and the file's modification time in nanoseconds since the epoch."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelFileError(f"{path}: expected a GGUF file, found a folder")
        if not stat.S_ISREG(mode):  # opening a pipe would block
            raise ModelFileError(f"{path}: expected a GGUF file, found a pipe or a device")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise ModelFileError(f"{path}: expected a GGUF file, found an empty file")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return mapping, os.dup(file.fileno()), status.st_mtime_ns
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path, or the file shrank
        if isinstance(error, OSError) and error.errno == errno.ENOTDIR:
            raise ModelNotFoundError(f"{path}: no such file") from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(f"{str(path)!r} cannot be read: {reason}") from None


def _read_version(cursor: _Cursor) -> int:
    cursor.require(4, "the magic number")
    magic = cursor.buffer[:4]
    if magic != MAGIC:
        raise cursor.error(f"not a GGUF file: expected the magic number {MAGIC!r}, found {magic!r}")
    cursor.offset = 4
    version: int = cursor.unpack(UINT32, "the version")
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in READ_VERSIONS:
        if swapped in READ_VERSIONS:
            raise UnsupportedModelError(
                f"{cursor.path}: the GGUF file is big-endian, expected little-endian; "
                "convert it with gguf-convert-endian"
            )
        raise UnsupportedModelError(
            f"{cursor.path}: GGUF version {version} is not supported, expected {' or '.join(map(str, READ_VERSIONS))}"
        )
    return version


def _read_metadata(cursor: _Cursor, n_keys: int) -> tuple[dict[str, MetadataValue], dict[str, tuple[int, int]]]:
    """Return the values, and the (start, end) offsets of each stored value including its type."""
    metadata: dict[str, MetadataValue] = {}
    spans: dict[str, tuple[int, int]] = {}
    for i in range(n_keys):
        key = cursor.string(f"the name of metadata key {i}")
        if not key:  # a key count that is too large reads padding as an empty name
            raise cursor.error(f"the name of metadata key {i} is empty")
        if key in metadata:
            raise cursor.error(f"the metadata key {short(key)} appears twice")
        start = cursor.offset
        metadata[key] = cursor.value(f"the metadata key {short(key)}")
        spans[key] = (start, cursor.offset)
    return metadata, spans


def _alignment(metadata: dict[str, MetadataValue], path: Path) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    # The specification requires a multiple of 8, and the kernels' loads of 4-byte floats rely on it.
    if isinstance(value, bool) or not isinstance(value, int) or value < 8 or value & (value - 1):
        raise ModelFileError(f"{path}: general.alignment is {short(value)}, expected a power of two of at least 8")
    return value


def _reject_split(metadata: dict[str, MetadataValue], path: Path) -> None:
    n_parts = metadata.get("split.count", 1)
    if isinstance(n_parts, int) and n_parts > 1:
        raise UnsupportedModelError(
            f"{path}: the file is one part of a model split into {n_parts} files, expected a single file; "
            "merge them with llama-gguf-split --merge"
        )


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read one entry of the tensor table: name, shape (row-major), type id, offset in the data section."""
    name = cursor.string("the name of a tensor")
    if not name:
        raise cursor.error("the name of a tensor is empty")
    n_dims = cursor.unpack(UINT32, f"the dimension count of tensor {short(name)}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(f"tensor {short(name)} has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
    dims = [cursor.unpack(UINT64, f"a dimension of tensor {short(name)}") for _ in range(n_dims)]
    type_id = cursor.unpack(UINT32, f"the type of tensor {short(name)}")
    offset = cursor.unpack(UINT64, f"the offset of tensor {short(name)}")
    return name, tuple(reversed(dims)), type_id, offset


def _place_tensors(
    entries: list[tuple[str, tuple[int, ...], int, int]],
    data_offset: int,
    alignment: int,
    file_bytes: int,
    path: Path,
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type_id, data_relative in entries:
        if name in tensors:
            raise ModelFileError(f"{path}: tensor {short(name)} appears twice")
        n_bytes = _tensor_bytes(name, shape, type_id, path)
        if data_relative % alignment:
            raise ModelFileError(
                f"{path}: tensor {short(name)} has the offset {data_relative}, expected a multiple of {alignment}"
            )
        offset = data_offset + data_relative
        if offset + n_bytes > file_bytes:
            raise ModelFileError(
                f"{path}: the file is truncated or corrupt: tensor {short(name)} needs {n_bytes} bytes "
                f"at offset {offset}, the file has {file_bytes} bytes"
            )
        tensors[name] = TensorInfo(name, type_id, shape, offset, n_bytes)
    _reject_overlap(tensors.values(), path)
    return tensors


def _tensor_bytes(name: str, shape: tuple[int, ...], type_id: int, path: Path) -> int:
    tensor_type = TENSOR_TYPES.get(type_id)
    if tensor_type is None:
        known = ", ".join(t.name for t in TENSOR_TYPES.values())
        raise UnsupportedModelError(
            f"{path}: tensor {short(name)} is of type {_type_name(type_id)}, which phi-c does not support; "
            f"expected one of {known}"
        )
    n_elements = 1
    for size in shape:  # Python integers do not overflow
        n_elements *= size
    if n_elements == 0:
        raise ModelFileError(f"{path}: tensor {short(name)} has the shape {shape}, expected positive sizes")
    if shape[-1] % tensor_type.block_elements:
        raise ModelFileError(
            f"{path}: tensor {short(name)} has rows of {shape[-1]} elements, expected a multiple of "
            f"{tensor_type.block_elements} ({tensor_type.name})"
        )
    return n_elements // tensor_type.block_elements * tensor_type.block_bytes


def _type_name(type_id: int) -> str:
    from gguf.constants import GGMLQuantizationType  # noqa: PLC0415 - 0.1 s, for this message only

    try:
        return str(GGMLQuantizationType(type_id).name)
    except ValueError:
        return f"{type_id} (unknown)"


def _reject_overlap(tensors: Iterable[TensorInfo], path: Path) -> None:
    previous: TensorInfo | None = None
    for info in sorted(tensors, key=lambda info: info.offset):
        if previous is not None and info.offset < previous.offset + previous.n_bytes:
            raise ModelFileError(
                f"{path}: tensors {short(previous.name)} and {short(info.name)} overlap: the first ends at offset "
                f"{previous.offset + previous.n_bytes}, the second starts at {info.offset}"
            )
        previous = info


def short(value: object) -> str:
    """Format a value for an error message: one line of at most 60 characters."""
    if isinstance(value, np.ndarray | list):
        return f"an array of {len(value)} elements"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
