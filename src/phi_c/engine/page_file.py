"""A file of KV pages, each with the key of its prefix: what saved states and the prefix cache on disk consist of.

header [40], what the pages belong to as JSON, a row [36] for each page (key, CRC-32), SHA-256 of all that; zeros up to
a multiple of 4096; the pages, as they lie in memory. Integers are little-endian. No row says where in its text a page
lies: its key stands for the whole prefix.
"""

import dataclasses
import hashlib
import json
import mmap
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from phi_c.errors import StateError

Bytes = npt.NDArray[np.uint8]

_MAGIC = b"PHIPAGES"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ")  # magic, version, bytes of JSON, rows, bytes a page, where pages begin
_ROW = struct.Struct("<32sI")
_DIGEST_BYTES = 32
_ALIGNMENT = 4096
_MOST_ROWS = 1 << 24
_MOST_JSON = 1 << 16


class UnreadableError(StateError):
    """The system does not give the file, whatever is in it."""


@dataclass(frozen=True)
class Origin:
    """What the bits of a page depend on besides its prefix: pages are at home only where all of it is equal."""

    model: str  # GGUFFile.identity, in hexadecimal
    kv_type: str
    tier: str  # sums have another order on each, so the last bits differ
    layout: str  # the same: "packed" or "mmap"
    page_version: int
    phi_c: str  # another release may compute otherwise

    def digest(self) -> bytes:
        """Return a SHA-256 that stands for all of it."""
        return hashlib.sha256(self.to_json()).digest()

    def to_json(self) -> bytes:
        """Return what a file's header says of it."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True).encode()


def write_pages(
    file: IO[bytes], origin: Origin, keys: Sequence[bytes], page_bytes: int, read: Callable[[bytes], Bytes | None]
) -> int:
    """Write a file of the pages that `read` gives, uint8 [page_bytes] or None for one to leave out.

    Returns how many there are. Raises OSError.
    """
    text = origin.to_json()
    start = _first_page_at(len(text), len(keys))
    rows = []
    file.seek(start)
    for key in keys:
        page = read(key)
        if page is not None:
            rows.append(_ROW.pack(key, zlib.crc32(page.data)))
            file.write(page.data)
    file.truncate(start + len(rows) * page_bytes)
    header = _HEADER.pack(_MAGIC, _VERSION, len(text), len(rows), page_bytes, start)
    head = header + text + b"".join(rows)
    file.seek(0)
    file.write(head + hashlib.sha256(head).digest())
    return len(rows)


def file_bytes(origin: Origin, n_pages: int, page_bytes: int) -> int:
    """Return the bytes of a file of so many pages."""
    return _first_page_at(len(origin.to_json()), n_pages) + n_pages * page_bytes


def _first_page_at(n_json: int, n_rows: int) -> int:
    return -(-(_HEADER.size + n_json + n_rows * _ROW.size + _DIGEST_BYTES) // _ALIGNMENT) * _ALIGNMENT


class PageFile:
    """A file of pages that are at home with an origin, mapped, as a context manager.

    Raises StateError, when it is opened, for a file that is damaged, truncated or of another origin.
    """

    def __init__(self, path: Path, origin: Origin, page_bytes: int) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UnreadableError(f"{path}: there is no such file") from None
        except ValueError:
            raise StateError(f"{path}: the file is empty") from None
        except OSError as error:
            raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from None
        try:
            self._read_header(origin, page_bytes)
        except BaseException:
            self._map.close()
            raise

    def _read_header(self, origin: Origin, page_bytes: int) -> None:
        data = self._map
        if len(data) < _HEADER.size or data[: len(_MAGIC)] != _MAGIC:
            raise StateError(f"{self.path}: not a saved state, expected the magic {_MAGIC.decode()}")
        _, version, n_json, n_rows, found_bytes, start = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise StateError(f"{self.path}: the format's version is {version}, expected {_VERSION}")
        end = _HEADER.size + n_json + n_rows * _ROW.size
        is_possible = n_json <= _MOST_JSON and n_rows <= _MOST_ROWS and end + _DIGEST_BYTES <= min(start, len(data))
        if not is_possible or data[end : end + _DIGEST_BYTES] != hashlib.sha256(data[:end]).digest():
            raise StateError(f"{self.path}: the header is damaged")
        if len(data) != start + n_rows * found_bytes:
            expected = start + n_rows * found_bytes
            raise StateError(f"{self.path}: the file has {len(data)} bytes, expected {expected}: it is truncated")
        _check_origin(self.path, json.loads(data[_HEADER.size : _HEADER.size + n_json]), origin)
        if found_bytes != page_bytes:
            raise StateError(f"{self.path}: a page has {found_bytes} bytes, expected {page_bytes}")
        rows = list(_ROW.iter_unpack(data[_HEADER.size + n_json : end]))
        self.keys: list[bytes] = [key for key, _ in rows]
        self._sums: list[int] = [checksum for _, checksum in rows]
        self._start, self._page_bytes = start, page_bytes

    def page(self, index: int) -> Bytes:
        """Return page number index, uint8 [page_bytes], a copy; raises StateError where it is damaged."""
        at = self._start + index * self._page_bytes
        data = np.frombuffer(self._map[at : at + self._page_bytes], np.uint8)
        if zlib.crc32(data.data) != self._sums[index]:
            raise StateError(f"{self.path}: page {index} is damaged, its checksum differs")
        return data

    def __enter__(self) -> "PageFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()


def _check_origin(path: Path, found: dict[str, object], expected: Origin) -> None:
    for name, value in dataclasses.asdict(expected).items():
        if found.get(name) == value:
            continue
        if name == "model":
            raise StateError(f"{path}: saved from another model file, or from this one before it changed")
        raise StateError(f"{path}: saved with {name} {found.get(name)!r:.60}, expected {value!r}")
