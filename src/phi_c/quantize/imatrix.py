"""Importance matrices: how strongly each column of a matrix is fed, which quantisers weigh their errors with.

Two formats of llama.cpp (tools/imatrix, common/imatrix-loader.cpp), little endian: GGUF with the tensors
`NAME.in_sum2`, sums of squares [n_experts, n_cols], and `NAME.counts`, tokens [n_experts, 1], both F32; and the older
.dat: int32 n_entries, then for each int32 n_bytes, name, int32 n_calls, int32 n_values, and n_values float32, mean
square x n_calls.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi_c._core import TENSOR_TYPES
from phi_c.errors import ModelFileError
from phi_c.gguf.reader import MAGIC, GGUFFile, short
from phi_c.storage import atomic_write

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

DEFAULT_CHUNK_SIZE = 512  # of llama.cpp; its .dat files do not tell theirs

_DATASETS, _N_CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_ALIGNMENT = 32
_U32, _STRING, _ARRAY, _F32 = 4, 8, 9, 0  # GGUF value types, and the tensor type
_MAX_F32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Entry:
    """What one matrix was fed: sums of squares float64 [n_experts, n_cols], and tokens int64 [n_experts]."""

    sums: Doubles
    counts: npt.NDArray[np.int64]

    def mean(self) -> Floats:
        """Return mean squares, float32 [n_experts, n_cols]; an expert that no token reached gets ones (llama.cpp)."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1.0).astype(np.float32)

    def plus(self, other: "Entry") -> "Entry":
        """Return the sum of two; raises ValueError where they differ in size.

        A .dat file knows no experts: its one row and count are cut for those of the other.
        """
        n_experts = max(len(self.counts), len(other.counts))
        if self.sums.size != other.sums.size:
            raise ValueError(f"{other.sums.size} columns, expected {self.sums.size}")
        if {len(self.counts), len(other.counts)} - {1, n_experts} or self.sums.size % n_experts:
            raise ValueError(f"{len(other.counts)} experts, expected {len(self.counts)}")
        shape = (n_experts, self.sums.size // n_experts)
        return Entry(self.sums.reshape(shape) + other.sums.reshape(shape), self.counts + other.counts)


@dataclass
class Imatrix:
    """An importance matrix: an Entry for each weight matrix, by tensor name.

    datasets: the texts it was collected from. chunk_size: tokens of a chunk.
    """

    chunk_size: int = DEFAULT_CHUNK_SIZE
    datasets: list[str] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def n_chunks(self) -> int:
        """The chunks that the matrix of most tokens has seen."""
        return max((int(e.counts.max()) for e in self.entries.values()), default=0) // self.chunk_size

    def merge(self, other: "Imatrix") -> None:
        """Add what another one has seen: all of it, or nothing when an exception such as KeyboardInterrupt comes.

        Raises ValueError where a matrix has other sizes there.
        """
        entries = dict(self.entries)
        for name, entry in other.entries.items():
            try:
                entries[name] = entries[name].plus(entry) if name in entries else entry
            except ValueError as error:
                raise ValueError(f"{name} has {error}") from None
        self.entries, self.datasets = entries, self.datasets + other.datasets

    def means(self) -> dict[str, Floats]:
        """Return mean squares by tensor name, float32 [n_experts, n_cols]."""
        return {name: entry.mean() for name, entry in self.entries.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a GGUF file that appears only when it is whole; raises OutputError where that cannot be done."""
        with atomic_write(Path(path)) as file:
            for part in self._gguf():
                file.write(part)

    def _gguf(self) -> Iterator[bytes]:
        tensors: list[tuple[str, Floats]] = []
        for name, entry in sorted(self.entries.items()):
            tensors.append((name + _SUMS, _trimmed(entry.sums)))
            tensors.append((name + _COUNTS, _trimmed(entry.counts[:, None])))
        keys = (
            _string("general.type") + struct.pack("<I", _STRING) + _string("imatrix"),
            _string(_DATASETS)
            + struct.pack("<IIQ", _ARRAY, _STRING, len(self.datasets))
            + b"".join(map(_string, self.datasets)),
            _string(_N_CHUNKS) + struct.pack("<II", _U32, self.n_chunks),
            _string(_CHUNK_SIZE) + struct.pack("<II", _U32, self.chunk_size),
        )
        header = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
        offset = 0
        for name, data in tensors:
            header += _string(name) + struct.pack(f"<I{data.ndim}Q", data.ndim, *reversed(data.shape))
            header += struct.pack("<IQ", _F32, offset)
            offset += -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
        yield _padded(header)
        for _, data in tensors:
            yield _padded(data.tobytes())


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, Floats]:
    """Return the mean squares of each matrix's input by tensor name: float32 [n_experts or 1, n_cols].

    An expert that no token reached has ones, as llama.cpp's quantiser takes it. A .dat file knows no experts: theirs
    lie in one row. Raises ModelFileError as `load_imatrix` does.
    """
    return load_imatrix(path).means()


def load_imatrix(path: str | os.PathLike[str], chunk_size: int = DEFAULT_CHUNK_SIZE) -> Imatrix:
    """Return the sums and counts of a GGUF or .dat file; chunk_size: of a .dat file, which does not tell.

    Raises ModelNotFoundError, ModelFileError for a file that is damaged or no importance matrix, and
    UnsupportedModelError where its tensors are of a type that phi-c does not run.
    """
    path = Path(path)
    if _is_dat(path):
        imatrix = _load_dat(path, chunk_size)
    else:
        with GGUFFile(path) as file:
            imatrix = _load_gguf(file)
    if not imatrix.entries:
        raise ModelFileError(f"{path}: the importance matrix is empty")
    for name, entry in imatrix.entries.items():
        if not ((entry.sums >= 0) & (entry.sums <= _MAX_F32)).all():  # nor NaN
            raise ModelFileError(f"{path}: {short(name)} holds {_outlier(entry.sums)}, expected sums of squares")
    return imatrix


def _load_gguf(file: GGUFFile) -> Imatrix:
    kind = file.metadata.get("general.type", "imatrix")
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    if kind != "imatrix" or not names:
        found = f"a {kind}" if isinstance(kind, str) and kind != "imatrix" else f"no tensor NAME{_SUMS}"
        raise ModelFileError(f"{file.path}: expected an importance matrix, found {found:.60}")
    chunk_size = file.metadata.get(_CHUNK_SIZE, DEFAULT_CHUNK_SIZE)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or not 1 <= chunk_size < 1 << 31:
        raise ModelFileError(f"{file.path}: {_CHUNK_SIZE} is {short(chunk_size)}, expected a positive integer")
    datasets = file.metadata.get(_DATASETS, [])
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise ModelFileError(f"{file.path}: {_DATASETS} is {short(datasets)}, expected an array of strings")
    imatrix = Imatrix(chunk_size, [str(name) for name in datasets])
    for name in names:
        sums, counts = _f32(file, name + _SUMS), _f32(file, name + _COUNTS).ravel()
        if not ((counts >= 0) & (counts < 1 << 62)).all():
            raise ModelFileError(f"{file.path}: {short(name + _COUNTS)} holds {_outlier(counts)}, expected counts")
        n_experts = len(counts) if len(counts) > 1 or sums.ndim == 1 else sums.size // sums.shape[-1]
        if n_experts % len(counts) or sums.size % n_experts:
            raise ModelFileError(
                f"{file.path}: {short(name)} has sums of the shape {sums.shape}, and {len(counts)} counts"
            )
        tokens = np.repeat(np.rint(counts).astype(np.int64), n_experts // len(counts))
        imatrix.entries[name] = Entry(sums.reshape(n_experts, -1), tokens)
    return imatrix


def _f32(file: GGUFFile, name: str) -> Doubles:
    data = file.data(name)  # refuses a name that the file lacks
    info = file.tensors[name]
    if TENSOR_TYPES[info.type_id].name != "F32":
        raise ModelFileError(f"{file.path}: {short(name)} is of type {TENSOR_TYPES[info.type_id].name}, expected F32")
    return data.view("<f4").reshape(info.shape).astype(np.float64)


def _is_dat(path: Path) -> bool:
    """Return whether a file can only be of the older kind, which has no mark; GGUFFile reports what else is wrong."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(8)
    except (OSError, ValueError):
        return False
    # The number of entries, and the length of the first one's name.
    return len(start) == 8 and all(0 < n < 1 << 20 for n in struct.unpack("<ii", start))


def _load_dat(path: Path, chunk_size: int) -> Imatrix:
    data = path.read_bytes()
    offset = 0

    def take(n_bytes: int) -> bytes:
        nonlocal offset
        if not 0 <= n_bytes <= len(data) - offset:
            raise ModelFileError(
                f"{path}: the importance matrix is truncated or damaged: {n_bytes} bytes at offset {offset}, "
                f"the file ends at {len(data)}"
            )
        offset += n_bytes
        return data[offset - n_bytes : offset]

    def integer() -> int:
        return int.from_bytes(take(4), "little", signed=True)

    def text() -> str:
        return take(integer()).decode("utf-8", "replace")

    imatrix = Imatrix(chunk_size)
    for _ in range(integer()):
        name, n_calls, n_values = text(), integer(), integer()
        if name in imatrix.entries or n_calls < 0 or n_values < 1:
            raise ModelFileError(
                f"{path}: the importance matrix is damaged: {short(name)} with {n_values} values of {n_calls} calls "
                f"before offset {offset}"
            )
        values = np.frombuffer(take(4 * n_values), "<f4").astype(np.float64)
        # Sums over tokens, as they were; a file that counts no calls holds the means themselves.
        counts = np.array([max(n_calls, 1) * chunk_size], np.int64)
        imatrix.entries[name] = Entry(values[None] * chunk_size, counts)
    if offset < len(data):  # newer ones tell the number of calls, and the text
        integer()
        imatrix.datasets = [text()] if offset < len(data) else []
    return imatrix


def _outlier(values: Doubles) -> float:
    return float(values[~((values >= 0) & (values <= _MAX_F32))].flat[0])


def _trimmed(values: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> Floats:
    """Return float32 as ggml writes it: a first axis of 1 is none."""
    return np.ascontiguousarray(values[0] if len(values) == 1 else values, "<f4")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _padded(raw: bytes) -> bytes:
    return raw + b"\0" * (-len(raw) % _ALIGNMENT)
