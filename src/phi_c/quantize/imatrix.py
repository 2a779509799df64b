"""Importance matrices: how strongly each column of a weight matrix is activated; quantisers weight errors by it.

Reads and writes llama.cpp's GGUF format (tools/imatrix): for each matrix the F32 tensors `NAME.in_sum2`, sums of
squared inputs [n_experts, n_cols], and `NAME.counts`, token counts [n_experts, 1].

Reads llama.cpp's older .dat format (common/imatrix-loader.cpp), little endian: int32 n_entries; for each entry int32
n_bytes, name, int32 n_calls, int32 n_values, and n_values float32, each mean square x n_calls.
"""

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi_c.errors import ModelFileError
from phi_c.gguf import writer
from phi_c.gguf.reader import GGUFFile, short
from phi_c.storage import atomic_write

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

DEFAULT_CHUNK_SIZE = 512  # tokens, as in llama.cpp; .dat files do not store theirs

_DATASETS, _N_CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_F32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Entry:
    """Statistics of the inputs of one matrix."""

    sums: Doubles  # sums of squares, float64 [n_experts, n_cols]
    counts: npt.NDArray[np.int64]  # tokens, int64 [n_experts]

    def mean(self) -> Floats:
        """Return mean squares, float32 [n_experts, n_cols]; ones for an expert without tokens, as in llama.cpp."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1.0).astype(np.float32)

    def add(self, other: "Entry") -> "Entry":
        """Return the sum of two entries; raises ValueError if their sizes differ.

        A .dat file does not store the number of experts: its single row is split into that of the other entry.
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
    """An importance matrix."""

    chunk_size: int = DEFAULT_CHUNK_SIZE  # tokens
    datasets: list[str] = field(default_factory=list)  # names of the text files it was collected from
    entries: dict[str, Entry] = field(default_factory=dict)  # by name of the weight tensor

    @property
    def n_chunks(self) -> int:
        """Number of chunks processed, from the entry with the most tokens."""
        return max((int(e.counts.max()) for e in self.entries.values()), default=0) // self.chunk_size

    def merge(self, other: "Imatrix") -> None:
        """Add the statistics of another importance matrix.

        An exception, including KeyboardInterrupt, leaves this one unchanged. Raises ValueError if the sizes of a
        matrix differ.
        """
        entries = dict(self.entries)
        for name, entry in other.entries.items():
            try:
                entries[name] = entries[name].add(entry) if name in entries else entry
            except ValueError as error:
                raise ValueError(f"{name} has {error}") from None
        self.entries, self.datasets = entries, self.datasets + other.datasets

    def means(self) -> dict[str, Floats]:
        """Return mean squares by tensor name: float32 [n_experts, n_cols]."""
        return {name: entry.mean() for name, entry in self.entries.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a GGUF file atomically; raises OutputError if it cannot be written."""
        tensors: dict[str, Floats] = {}
        for name, entry in sorted(self.entries.items()):
            tensors[name + _SUMS] = _squeezed(entry.sums)
            tensors[name + _COUNTS] = _squeezed(entry.counts[:, None])
        metadata = {
            "general.type": writer.string("imatrix"),
            _DATASETS: writer.strings(self.datasets),
            _N_CHUNKS: writer.u32(self.n_chunks),
            _CHUNK_SIZE: writer.u32(self.chunk_size),
        }
        plan = writer.Plan(
            metadata, tuple(writer.TensorSpec(name, values.shape, "F32") for name, values in tensors.items())
        )
        with atomic_write(Path(path)) as file:
            writer.write(file, plan, ([values.tobytes()] for values in tensors.values()))


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, Floats]:
    """Return the mean squares of each matrix's input by tensor name: float32 [n_experts, n_cols].

    An expert without tokens has ones, as in llama.cpp. From a .dat file, the columns of all experts are in one row.
    Raises the errors of `load_imatrix`.
    """
    return load_imatrix(path).means()


def load_imatrix(path: str | os.PathLike[str], chunk_size: int = DEFAULT_CHUNK_SIZE) -> Imatrix:
    """Return the importance matrix in a GGUF or .dat file.

    chunk_size: tokens per chunk of a .dat file, which does not store it.

    Raises ModelNotFoundError, ModelFileError if the file is corrupt or not an importance matrix, and
    UnsupportedModelError for a tensor type that phi-c does not support.
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
        if not ((entry.sums >= 0) & (entry.sums <= _MAX_F32)).all():  # false for NaN
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
                f"{file.path}: {short(name)} has sums of shape {sums.shape} and {len(counts)} counts, "
                "expected one row of sums per count"
            )
        tokens = np.repeat(np.rint(counts).astype(np.int64), n_experts // len(counts))
        imatrix.entries[name] = Entry(sums.reshape(n_experts, -1), tokens)
    return imatrix


def _f32(file: GGUFFile, name: str) -> Doubles:
    data = file.data(name)  # raises if the file has no such tensor
    info = file.tensors[name]
    if info.type_name != "F32":
        raise ModelFileError(f"{file.path}: {short(name)} is of type {info.type_name}, expected F32")
    return data.view("<f4").reshape(info.shape).astype(np.float64)


def _is_dat(path: Path) -> bool:
    """Return whether a file looks like a .dat file, which has no magic number; GGUFFile reports other errors."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(8)
    except (OSError, ValueError):
        return False
    # The number of entries and the length of the first name.
    return len(start) == 8 and all(0 < n < 1 << 20 for n in struct.unpack("<ii", start))


def _load_dat(path: Path, chunk_size: int) -> Imatrix:
    data = path.read_bytes()
    offset = 0

    def read(n_bytes: int) -> bytes:
        nonlocal offset
        if not 0 <= n_bytes <= len(data) - offset:
            raise ModelFileError(
                f"{path}: the importance matrix is truncated or corrupt: {n_bytes} bytes needed at offset {offset}, "
                f"the file has {len(data)} bytes"
            )
        offset += n_bytes
        return data[offset - n_bytes : offset]

    def integer() -> int:
        return int.from_bytes(read(4), "little", signed=True)

    def string() -> str:
        return read(integer()).decode("utf-8", "replace")

    imatrix = Imatrix(chunk_size)
    for _ in range(integer()):
        name, n_calls, n_values = string(), integer(), integer()
        if name in imatrix.entries or n_calls < 0 or n_values < 1:
            raise ModelFileError(
                f"{path}: the importance matrix is corrupt: entry {short(name)} with {n_values} values of {n_calls} "
                f"calls before offset {offset}"
            )
        values = np.frombuffer(read(4 * n_values), "<f4").astype(np.float64)
        # Back to sums over tokens. A file with n_calls 0 holds the means themselves.
        counts = np.array([max(n_calls, 1) * chunk_size], np.int64)
        imatrix.entries[name] = Entry(values[None] * chunk_size, counts)
    if offset < len(data):  # newer files end with the number of calls and the name of the dataset
        integer()
        imatrix.datasets = [string()] if offset < len(data) else []
    return imatrix


def _outlier(values: Doubles) -> float:
    return float(values[~((values >= 0) & (values <= _MAX_F32))].flat[0])


def _squeezed(values: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> Floats:
    """Return float32 without a first axis of size 1, as ggml stores it."""
    return np.ascontiguousarray(values[0] if len(values) == 1 else values, "<f4")
