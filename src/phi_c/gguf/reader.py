"""GGUF files: a memory-mapped file whose header is checked, field by field, against the file's real size.

Follows the GGUF specification (docs/gguf.md of ggml), versions 2 and 3, little endian.
"""

import contextlib
import errno
import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from phi_c._core import TENSOR_TYPES, read_strings
from phi_c.errors import ModelClosedError, ModelFileError, ModelNotFoundError, UnsupportedModelError

MetadataValue: TypeAlias = bool | int | float | str | list[str] | npt.NDArray[Any] | list["MetadataValue"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

# GGUF value type ids; the scalars are the keys of _SCALARS.
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    type_id: struct.Struct("<" + code)
    for type_id, code in enumerate(("B", "b", "H", "h", "I", "i", "f", "B", "", "", "Q", "q", "d"))
    if code
}
_DTYPES = {
    type_id: np.dtype("<" + code)
    for type_id, code in enumerate(
        ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "u1", "", "", "u8", "i8", "f8"),
    )
    if code
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# The least bytes that each kind of entry takes: a count above (bytes left) / (least bytes) cannot be true.
_MIN_STRING_BYTES = 8  # length
_MIN_ARRAY_BYTES = 12  # element type, count
_MIN_KEY_BYTES = 13  # key length, value type, a value of one byte
_MIN_TENSOR_BYTES = 32  # name length, n_dims, one dimension, type, offset

# Far above any published file. In a file of gigabytes a flipped bit can give a count or a length that
# fits the file and would still cost gigabytes of memory before the damage shows.
_MAX_ITEMS = 1 << 24
_MAX_NESTED_ARRAYS = 1 << 16
_MAX_DEPTH = 4

# What `identity` reads of the data.
_N_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in the file.

    shape is row-major, (n_rows, n_cols) for a matrix: GGUF's own dimensions reversed. offset counts from the
    start of the file, in bytes.
    """

    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class GGUFFile:
    """A GGUF file mapped read-only into memory, as a context manager.

    Everything in the header is checked on opening, so `data` never reads outside the file. Raises
    ModelNotFoundError when there is no such file, ModelFileError when it cannot be read, is damaged or is
    no GGUF file, UnsupportedModelError for tensor types that phi-c does not run and for split files.
    """

    path: Path
    version: int
    alignment: int  # bytes
    metadata: dict[str, MetadataValue]  # numeric arrays are read-only ndarrays
    tensors: dict[str, TensorInfo]  # in the order of the file
    n_bytes: int
    data_offset: int  # where the header ends and tensor data begins

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        mapping, self._modified_ns = _map_file(self.path)
        self._map: mmap.mmap | None = mapping
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
        _refuse_split(self.metadata, self.path)
        cursor.check_count(n_tensors, "the number of tensors", _MIN_TENSOR_BYTES)
        entries = [_read_tensor_entry(cursor) for _ in range(n_tensors)]
        self.data_offset = -(-cursor.offset // self.alignment) * self.alignment
        self.tensors = _place_tensors(entries, self.data_offset, self.alignment, self.n_bytes, self.path)

    def raw_metadata(self) -> dict[str, bytes]:
        """Return each key's value as it lies in the file, its type before it; raises ModelClosedError after `close`."""
        if self._map is None:
            raise ModelClosedError(f"{self.path}: the file was closed")
        return {key: self._map[start:end] for key, (start, end) in self._value_spans.items()}

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of one tensor: uint8 [n_bytes], a read-only view of the mapping.

        Raises ModelFileError when the file has no such tensor, ModelClosedError after `close`.
        """
        if self._map is None:
            raise ModelClosedError(f"{self.path}: the file was closed")
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.path}: the file has no tensor {short(name)}")
        return np.frombuffer(self._map, np.uint8, info.n_bytes, info.offset)

    def all_data(self) -> npt.NDArray[np.uint8]:
        """Return the bytes of all tensors, with what lies between them: uint8, a read-only view of the mapping.

        Raises ModelClosedError after `close`.
        """
        if self._map is None:
            raise ModelClosedError(f"{self.path}: the file was closed")
        return np.frombuffer(self._map, np.uint8)[self.data_offset :]

    def identity(self) -> bytes:
        """Return a SHA-256 that another file, or this one changed, does not have: of size, time of change and header,
        and of samples of the data, for files that were copied over each other with their times.

        Raises ModelClosedError after `close`.
        """
        if self._map is None:
            raise ModelClosedError(f"{self.path}: the file was closed")
        digest = hashlib.sha256(f"{self.n_bytes} {self._modified_ns} ".encode())
        digest.update(self._map[: self.data_offset])
        for i in range(_N_SAMPLES):
            start = self.data_offset + (self.n_bytes - self.data_offset) * i // _N_SAMPLES
            digest.update(self._map[start : start + _SAMPLE_BYTES])
        return digest.digest()

    def release(self) -> None:
        """Let the pages read so far leave this process's memory; the system's file cache keeps them."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the file; views that `data` gave out stay valid and keep the mapping until they are gone."""
        mapping, self._map = self._map, None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # views are alive: the last of them to go unmaps the file
                mapping.close()

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Cursor:
    """Reads forward through the header and refuses to leave the file."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.size = len(buffer)
        self.offset = 0

    def error(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {message}")

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.offset:
            raise self.error(
                f"the file is truncated or damaged: {what} takes {n_bytes} bytes at offset {self.offset}, "
                f"the file ends at {self.size}"
            )

    def unpack(self, field: struct.Struct, what: str) -> Any:
        self.need(field.size, what)
        (value,) = field.unpack_from(self.buffer, self.offset)
        self.offset += field.size
        return value

    def count(self, what: str, least_bytes: int, at_most: int | None = None) -> int:
        value: int = self.unpack(_U64, what)
        self.check_count(value, what, least_bytes, at_most)
        return value

    def check_count(self, value: int, what: str, least_bytes: int, at_most: int | None = None) -> None:
        left = self.size - self.offset
        if value * least_bytes > left:
            raise self.error(
                f"the file is truncated or damaged: {what} is {value}, at least {value * least_bytes} bytes, "
                f"and {left} bytes are left at offset {self.offset}"
            )
        if at_most is not None and value > at_most:
            raise self.error(f"{what} is {value}, expected at most {at_most}")

    def string(self, what: str) -> str:
        n_bytes = self.count(f"the length of {what}", 1, _MAX_ITEMS)
        raw = self.buffer[self.offset : self.offset + n_bytes]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = self.offset + error.start
            raise self.error(f"{what} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {where}") from None
        self.offset += n_bytes
        return text

    def value(self, what: str) -> MetadataValue:
        type_id = self.unpack(_U32, f"the value type of {what}")
        if type_id == _STRING:
            return self.string(what)
        if type_id == _ARRAY:
            return self.array(what, 1)
        if type_id not in _SCALARS:
            raise self.error(f"{what} has the unknown value type {type_id}, expected 0 to 12")
        value: bool | int | float = self.unpack(_SCALARS[type_id], what)
        if type_id == _BOOL:
            if value not in (0, 1):
                raise self.error(f"{what} is a bool, expected the byte 0 or 1, found {value}")
            return bool(value)
        return value

    def array(self, what: str, depth: int) -> MetadataValue:
        type_id = self.unpack(_U32, f"the element type of {what}")
        counted = f"the element count of {what}"
        if type_id == _STRING:
            return self.strings(what, self.count(counted, _MIN_STRING_BYTES, _MAX_ITEMS))
        if type_id == _ARRAY:
            if depth == _MAX_DEPTH:
                raise self.error(f"{what} nests arrays more than {_MAX_DEPTH} deep")
            n_arrays = self.count(counted, _MIN_ARRAY_BYTES, _MAX_NESTED_ARRAYS)
            return [self.array(what, depth + 1) for _ in range(n_arrays)]
        if type_id not in _DTYPES:
            raise self.error(f"{what} has the unknown element type {type_id}, expected 0 to 12")
        dtype = _DTYPES[type_id]
        n_items = self.count(counted, dtype.itemsize, _MAX_ITEMS)
        # A copy, for a view would keep the mapping open for as long as the metadata lives.
        values = np.frombuffer(self.buffer, dtype, n_items, self.offset).copy() if n_items else np.empty(0, dtype)
        if type_id == _BOOL:
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


def _map_file(path: Path) -> tuple[mmap.mmap, int]:
    """Return the mapping, and when the file was last changed: nanoseconds on the system's clock."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelFileError(f"{path}: expected a GGUF file, found a folder")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise ModelFileError(f"{path}: expected a GGUF file, found a pipe or a device")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise ModelFileError(f"{path}: expected a GGUF file, found an empty file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), status.st_mtime_ns
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path, a file that shrank
        if isinstance(error, OSError) and error.errno == errno.ENOTDIR:
            raise ModelNotFoundError(f"{path}: no such file") from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(f"{str(path)!r} cannot be read: {reason}") from None


def _read_version(cursor: _Cursor) -> int:
    cursor.need(4, "the magic number")
    magic = cursor.buffer[:4]
    if magic != MAGIC:
        raise cursor.error(f"this is no GGUF file: expected the magic number {MAGIC!r}, found {magic!r}")
    cursor.offset = 4
    version: int = cursor.unpack(_U32, "the version")
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in VERSIONS:
        if swapped in VERSIONS:
            raise UnsupportedModelError(
                f"{cursor.path}: this is a big-endian GGUF file, expected little endian; "
                "convert it with gguf-convert-endian"
            )
        raise UnsupportedModelError(
            f"{cursor.path}: GGUF version {version} is not supported, expected {' or '.join(map(str, VERSIONS))}"
        )
    return version


def _read_metadata(cursor: _Cursor, n_keys: int) -> tuple[dict[str, MetadataValue], dict[str, tuple[int, int]]]:
    """Return values, and where they lie in the file, with their types."""
    metadata: dict[str, MetadataValue] = {}
    spans: dict[str, tuple[int, int]] = {}
    for i in range(n_keys):
        key = cursor.string(f"the name of metadata key {i}")
        if not key:  # what a wrong count finds in the padding
            raise cursor.error(f"the name of metadata key {i} is empty")
        if key in metadata:
            raise cursor.error(f"the metadata key {short(key)} appears twice")
        start = cursor.offset
        metadata[key] = cursor.value(f"the metadata key {short(key)}")
        spans[key] = (start, cursor.offset)
    return metadata, spans


def _alignment(metadata: dict[str, MetadataValue], path: Path) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    # 8: what the specification asks for, and what the kernels' loads of 4-byte floats rely on.
    if isinstance(value, bool) or not isinstance(value, int) or value < 8 or value & (value - 1):
        raise ModelFileError(f"{path}: general.alignment is {short(value)}, expected a power of two of at least 8")
    return value


def _refuse_split(metadata: dict[str, MetadataValue], path: Path) -> None:
    n_parts = metadata.get("split.count", 1)
    if isinstance(n_parts, int) and n_parts > 1:
        raise UnsupportedModelError(
            f"{path}: this is one part of a model split into {n_parts} files, expected a single file; "
            "merge them with llama-gguf-split --merge"
        )


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read one entry of the tensor table: name, shape (row-major), type id, offset in the data section."""
    name = cursor.string("the name of a tensor")
    if not name:
        raise cursor.error("the name of a tensor is empty")
    n_dims = cursor.unpack(_U32, f"the dimension count of tensor {short(name)}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(f"tensor {short(name)} has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
    dims = [cursor.unpack(_U64, f"a dimension of tensor {short(name)}") for _ in range(n_dims)]
    type_id = cursor.unpack(_U32, f"the type of tensor {short(name)}")
    offset = cursor.unpack(_U64, f"the offset of tensor {short(name)}")
    return name, tuple(reversed(dims)), type_id, offset


def _place_tensors(
    entries: list[tuple[str, tuple[int, ...], int, int]],
    data_offset: int,
    alignment: int,
    file_bytes: int,
    path: Path,
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type_id, relative in entries:
        if name in tensors:
            raise ModelFileError(f"{path}: tensor {short(name)} appears twice")
        n_bytes = _tensor_bytes(name, shape, type_id, path)
        if relative % alignment:
            raise ModelFileError(
                f"{path}: tensor {short(name)} has the offset {relative}, expected a multiple of {alignment}"
            )
        offset = data_offset + relative
        if offset + n_bytes > file_bytes:
            raise ModelFileError(
                f"{path}: the file is truncated or damaged: tensor {short(name)} takes {n_bytes} bytes "
                f"at offset {offset}, the file ends at {file_bytes}"
            )
        tensors[name] = TensorInfo(name, type_id, shape, offset, n_bytes)
    _refuse_overlap(tensors.values(), path)
    return tensors


def _tensor_bytes(name: str, shape: tuple[int, ...], type_id: int, path: Path) -> int:
    tensor_type = TENSOR_TYPES.get(type_id)
    if tensor_type is None:
        known = ", ".join(t.name for t in TENSOR_TYPES.values())
        raise UnsupportedModelError(
            f"{path}: tensor {short(name)} is of type {_type_name(type_id)}, which phi-c does not run; "
            f"expected one of {known}"
        )
    n_elements = 1
    for size in shape:  # Python integers: a product of absurd sizes is large, not wrapped
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
    from gguf.constants import GGMLQuantizationType  # noqa: PLC0415 - 0.1 s that only this message needs

    try:
        return str(GGMLQuantizationType(type_id).name)
    except ValueError:
        return f"{type_id} (unknown)"


def _refuse_overlap(tensors: Iterable[TensorInfo], path: Path) -> None:
    previous: TensorInfo | None = None
    for info in sorted(tensors, key=lambda info: info.offset):
        if previous is not None and info.offset < previous.offset + previous.n_bytes:
            raise ModelFileError(
                f"{path}: tensors {short(previous.name)} and {short(info.name)} overlap: one ends at offset "
                f"{previous.offset + previous.n_bytes}, the other begins at {info.offset}"
            )
        previous = info


def short(value: object) -> str:
    """Return a value as it may appear in an error message: one line, whatever its size."""
    if isinstance(value, np.ndarray | list):
        return f"an array of {len(value)} elements"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
