"""The file format of saved states and of the prefix cache on disk: KV pages, each with the key of its prefix.

    header          40 bytes, see _HEADER
    origin          JSON, see Origin
    page table      36 bytes per page: key, CRC-32
    checksum        32 bytes: SHA-256 of all of the above
    padding         zeros up to a multiple of 4096 bytes
    pages           page_bytes each, as in memory

Integers are little-endian. Positions are not stored: a page's key identifies its whole prefix.
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
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from phi_c.errors import StateError

Bytes = npt.NDArray[np.uint8]

_MAGIC = b"PHIPAGES"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ")  # magic, version, bytes of JSON, number of pages, page_bytes, offset of the pages
_ROW = struct.Struct("<32sI")  # key, CRC-32
_DIGEST_BYTES = 32
_ALIGNMENT = 4096
_MAX_PAGES = 1 << 24
_MAX_JSON_BYTES = 1 << 16


class UnreadableError(StateError):
    """The system cannot read the file; its content may be intact."""


@dataclass(frozen=True)
class Origin:
    """What the bits of a page depend on besides its prefix. Pages are loaded only where all fields are equal."""

    model: str  # GGUFFile.identity in hexadecimal
    kv_type: str
    tier: str  # the order of sums depends on it, and so the last bits
    layout: str  # "packed" or "mmap"; likewise
    page_version: int  # KV_PAGE_VERSION
    phi_c: str  # release; another one may compute other bits

    def digest(self) -> bytes:
        """Return a SHA-256 of all fields."""
        return hashlib.sha256(self.to_json()).digest()

    def to_json(self) -> bytes:
        """Return the JSON of a file's header."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True).encode()


def write_pages(
    file: IO[bytes], origin: Origin, keys: Sequence[bytes], page_bytes: int, read: Callable[[bytes], Bytes | None]
) -> int:
    """Write a page file and return the number of its pages.

    read: returns the page of a key, uint8 [page_bytes], or None to omit it. Raises OSError.
    """
    json_bytes = origin.to_json()
    start = _pages_offset(len(json_bytes), len(keys))
    rows = []
    file.seek(start)
    for key in keys:
        page = read(key)
        if page is not None:
            rows.append(_ROW.pack(key, zlib.crc32(page.data)))
            file.write(page.data)
    file.truncate(start + len(rows) * page_bytes)
    header = _HEADER.pack(_MAGIC, _VERSION, len(json_bytes), len(rows), page_bytes, start)
    head = header + json_bytes + b"".join(rows)
    file.seek(0)
    file.write(head + hashlib.sha256(head).digest())
    return len(rows)


def file_bytes(origin: Origin, n_pages: int, page_bytes: int) -> int:
    """Return the size of a page file in bytes."""
    return _pages_offset(len(origin.to_json()), n_pages) + n_pages * page_bytes


def _pages_offset(n_json_bytes: int, n_pages: int) -> int:
    return -(-(_HEADER.size + n_json_bytes + n_pages * _ROW.size + _DIGEST_BYTES) // _ALIGNMENT) * _ALIGNMENT


class PageFile:
    """A mapped page file of an expected origin; a context manager.

    Opening it raises StateError for a corrupt or truncated file or another origin, UnreadableError if the system cannot
    read it.
    """

    def __init__(self, path: Path, origin: Origin, page_bytes: int) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UnreadableError(f"{path}: no such file") from None
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
        _, version, n_json_bytes, n_pages, found_bytes, start = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise StateError(f"{self.path}: the format version is {version}, expected {_VERSION}")
        end = _HEADER.size + n_json_bytes + n_pages * _ROW.size
        is_possible = (
            n_json_bytes <= _MAX_JSON_BYTES and n_pages <= _MAX_PAGES and end + _DIGEST_BYTES <= min(start, len(data))
        )
        if not is_possible or data[end : end + _DIGEST_BYTES] != hashlib.sha256(data[:end]).digest():
            raise StateError(f"{self.path}: the header is corrupt")
        if len(data) != start + n_pages * found_bytes:
            expected = start + n_pages * found_bytes
            raise StateError(f"{self.path}: the file has {len(data)} bytes, expected {expected}: it is truncated")
        _check_origin(self.path, json.loads(data[_HEADER.size : _HEADER.size + n_json_bytes]), origin)
        if found_bytes != page_bytes:
            raise StateError(f"{self.path}: pages have {found_bytes} bytes, expected {page_bytes}")
        rows = list(_ROW.iter_unpack(data[_HEADER.size + n_json_bytes : end]))
        self.keys: list[bytes] = [key for key, _ in rows]
        self._checksums: list[int] = [checksum for _, checksum in rows]
        self._start, self._page_bytes = start, page_bytes

    def page(self, index: int) -> Bytes:
        """Return a copy of page `index`: uint8 [page_bytes]. Raises StateError if it is corrupt."""
        at = self._start + index * self._page_bytes
        data = np.frombuffer(self._map[at : at + self._page_bytes], np.uint8)
        if zlib.crc32(data.data) != self._checksums[index]:
            raise StateError(f"{self.path}: page {index} is corrupt: its checksum differs")
        return data

    def __enter__(self) -> Self:
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
