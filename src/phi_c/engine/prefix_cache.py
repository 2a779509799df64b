"""A prefix cache on disk: the pages of finished prompts in files, which later processes find again.

Each prompt adds one file (see page_file) of those of its pages that no file has yet, so files are few and a long prefix
is read from as many files as there were turns. They lie in a folder for each origin; which keys they hold is read from
their headers once, and again of new ones when the folder changes. Files appear whole and are replaced whole, so several
processes can share them; those used longest ago go when there is no room. A damaged file is deleted and counts as never
written.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from phi_c._core import DISK_CACHE, ForkLock, KvCache
from phi_c.engine.engine import Engine
from phi_c.engine.page_file import Origin, PageFile, UnreadableError, file_bytes, write_pages
from phi_c.errors import CacheError, ModelClosedError, OptionError, StateError
from phi_c.storage import atomic_write, cache_dir, remove_stale_parts

LIMIT_VARIABLE = "PHI_C_PREFIX_CACHE_GIB"
_DEFAULT_LIMIT_GIB = 8.0
_SUFFIX = ".pages"


class DiskPrefixCache:
    """The files of one origin below a folder, as the scheduler's kv_connector; safe to use from several threads.

    limit_bytes bounds the files of all origins together, but for those that others write at the same moment. Raises
    CacheError when the folder cannot be made.
    """

    def __init__(self, folder: Path, origin: Origin, kv: KvCache, limit_bytes: int) -> None:
        self._root = folder
        self.folder = folder / origin.digest().hex()[:32]
        self._origin = origin
        self._kv = kv
        self._limit_bytes = limit_bytes
        self._lock = ForkLock(DISK_CACHE)
        self._keys: dict[str, list[bytes]] = {}  # of each file, by its name
        self._place: dict[bytes, str] = {}  # the same by key
        self._changed_ns = -1  # of the folder, when it was read
        self._has_failed = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{self.folder} cannot be made: {error.strerror or error}") from None

    def refresh(self) -> None:
        """Look for what other processes have added or removed."""
        with self._lock, contextlib.suppress(OSError):
            changed_ns = self.folder.stat().st_mtime_ns
            if changed_ns == self._changed_ns:
                return
            names = {entry.name for entry in os.scandir(self.folder) if entry.name.endswith(_SUFFIX)}
            for name in self._keys.keys() - names:
                del self._keys[name]
            for name in names - self._keys.keys():
                self._read_keys(name)
            self._index()
            self._changed_ns = changed_ns

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self._place

    def fetch(self, pages: Mapping[bytes, int]) -> bool:
        """Copy the pages of keys, all contained, into pages of the cache; False where that cannot be done.

        Files that are gone or damaged are not asked again, so a caller may look once more for what is contained.
        """
        with self._lock:
            wanted: dict[str, dict[bytes, int]] = {}
            for key, page in pages.items():
                if key not in self._place:  # another process has deleted its file just now
                    return False
                wanted.setdefault(self._place[key], {})[key] = page
            if all(self._copy(name, some) for name, some in wanted.items()):
                return True
            self._index()
            return False

    def keep(self, engine: Engine, keys: Sequence[bytes]) -> None:
        """Write a file of those pages that no file has yet. Where that fails, warn once and keep nothing more."""
        if self._has_failed:
            return
        with contextlib.suppress(ModelClosedError):  # another thread has no more use for it
            self._keep(engine, keys)

    def _keep(self, engine: Engine, keys: Sequence[bytes]) -> None:
        self.refresh()
        known = set(engine.known_keys())
        # The beginning of a prompt is worth more than its end, should it be larger than the limit.
        new = [key for key in keys if key in known and key not in self][: self._limit_bytes // self._kv.page_bytes]
        if not new or file_bytes(self._origin, len(new), self._kv.page_bytes) > self._limit_bytes:
            return
        path = self.folder / (hashlib.sha256(b"".join(new)).hexdigest()[:32] + _SUFFIX)
        try:
            self._make_room(file_bytes(self._origin, len(new), self._kv.page_bytes))
            with atomic_write(path, CacheError) as file:
                write_pages(file, self._origin, new, self._kv.page_bytes, engine.read_page)
            self._make_room(0)  # others may have taken the same room meanwhile; the last of them sees all files
        except CacheError as error:
            self._has_failed = True
            warnings.warn(f"the prefix cache keeps nothing more: {error}", RuntimeWarning, stacklevel=3)

    def _copy(self, name: str, pages: Mapping[bytes, int]) -> bool:
        path = self.folder / name
        try:
            with PageFile(path, self._origin, self._kv.page_bytes) as file:
                # Whoever writes the same pages at the same time, and loses one of them meanwhile, puts a file with
                # fewer in its place.
                self._keys[name] = file.keys
                index_of = {key: i for i, key in enumerate(file.keys)}
                if not pages.keys() <= index_of.keys():
                    return False
                for key, page in pages.items():
                    self._kv.write_page(page, file.page(index_of[key]))
        except StateError as error:
            self._keys.pop(name, None)
            _delete_damaged(path, error)
            return False
        with contextlib.suppress(OSError):
            os.utime(path)  # used last
        return True

    def _read_keys(self, name: str) -> None:
        path = self.folder / name
        try:
            with PageFile(path, self._origin, self._kv.page_bytes) as file:
                self._keys[name] = file.keys
        except StateError as error:
            _delete_damaged(path, error)

    def _index(self) -> None:
        # Processes that write at the same time may write the same page: one place is enough, until it goes.
        self._place = {key: name for name, keys in self._keys.items() for key in keys}

    def _make_room(self, n_bytes: int) -> None:
        """Delete the files used longest ago, of any origin, until so many bytes fit the limit."""
        files = _files(self._root)
        total = sum(size for _, size, _ in files) + n_bytes
        for _, size, path in sorted(files):
            if total <= self._limit_bytes:
                break
            with contextlib.suppress(OSError):  # Windows has it mapped
                path.unlink(missing_ok=True)  # another process may be faster
                total -= size
        for folder in self._root.glob("*/"):
            remove_stale_parts(folder)


def _delete_damaged(path: Path, error: StateError) -> None:
    if not isinstance(error, UnreadableError):  # of which the file may be innocent
        with contextlib.suppress(OSError):
            path.unlink()


def _files(root: Path) -> list[tuple[int, int, Path]]:
    """Return (time of last use, bytes, path) of each file, of any origin."""
    files = []
    for path in root.glob(f"*/*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    return files


def open_prefix_cache(where: Literal[True] | str | os.PathLike[str], origin: Origin, engine: Engine) -> DiskPrefixCache:
    """Return a cache that an engine looks into: in a folder, or for True in phi-c's own.

    Raises CacheError, OptionError.
    """
    folder = default_folder() if where is True else Path(os.fspath(where)).expanduser()
    cache = DiskPrefixCache(folder, origin, engine.kv, limit_bytes())
    engine.scheduler.kv_connector = cache
    return cache


def default_folder() -> Path:
    """Return where files lie when nobody says."""
    return cache_dir() / "prefix"


def n_bytes_kept() -> int:
    """Return what the files below `default_folder` take."""
    return sum(size for _, size, _ in _files(default_folder()))


def limit_bytes() -> int:
    """Return what files may take: PHI_C_PREFIX_CACHE_GIB, else 8 GiB. Raises OptionError."""
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_LIMIT_GIB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1 << 20:
        raise OptionError(f"{LIMIT_VARIABLE} is {text!r:.60}, expected a number of GiB")
    return int(limit * 2**30)
