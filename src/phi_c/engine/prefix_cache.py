"""The prefix cache on disk: KV pages of finished prompts in files, shared by processes.

Each prompt adds one page file with the pages that no file has yet. A long prefix is therefore read from as many files
as the conversation had turns. Each origin has a folder. The keys of a file are read once from its header, and the
folder is listed again when its modification time changes. Files are written atomically and never modified; the least
recently used ones are deleted to stay below the limit. A corrupt file is deleted and ignored.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from phi_c._core import KvCache
from phi_c.engine.engine import Engine
from phi_c.engine.kv_pages import prefix_keys
from phi_c.engine.loop import EngineLoop
from phi_c.engine.page_file import Origin, PageFile, UnreadableError, file_bytes, write_pages
from phi_c.errors import CacheError, ModelClosedError, OptionError, StateError
from phi_c.storage import atomic_write, cache_dir, remove_stale_parts

LIMIT_VARIABLE = "PHI_C_PREFIX_CACHE_GIB"
_DEFAULT_LIMIT_GIB = 8.0
_SUFFIX = ".pages"


class DiskPrefixCache:
    """The page files of one origin, as the scheduler's KVConnector.

    The index of files belongs to the engine's thread; `store` may be called from any thread and writes files only.

    folder: contains a folder for each origin.
    limit_bytes: maximum total size of the files of all origins; processes that write at the same time may exceed it
        for a moment.

    Raises CacheError if the folder cannot be created.
    """

    def __init__(self, folder: Path, origin: Origin, kv: KvCache, limit_bytes: int) -> None:
        self._root = folder
        self.folder = folder / origin.digest().hex()[:32]
        self._origin = origin
        self._kv = kv
        self._limit_bytes = limit_bytes
        self._keys: dict[str, list[bytes]] = {}  # file name -> keys of its pages
        self._file_of: dict[bytes, str] = {}  # key -> name of a file that has its page
        self._folder_mtime_ns = -1  # at the last listing
        self._is_disabled = False  # after a failed write
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{self.folder} cannot be created: {error.strerror or error}") from None

    def refresh(self) -> None:
        """Add the files that other processes wrote to the index, and drop those they deleted."""
        with contextlib.suppress(OSError):
            mtime_ns = self.folder.stat().st_mtime_ns
            if mtime_ns == self._folder_mtime_ns:
                return
            names = {entry.name for entry in os.scandir(self.folder) if entry.name.endswith(_SUFFIX)}
            for name in self._keys.keys() - names:
                del self._keys[name]
            for name in names - self._keys.keys():
                self._read_keys(name)
            self._update_index()
            self._folder_mtime_ns = mtime_ns

    def __contains__(self, key: bytes) -> bool:
        return key in self._file_of

    def fetch(self, pages: Mapping[bytes, int]) -> bool:
        """Copy the pages of keys into pages of the KV cache; see KVConnector.

        After False the index no longer contains the files that are gone or corrupt, so the caller may try again.
        """
        by_file: dict[str, dict[bytes, int]] = {}
        for key, page in pages.items():
            if key not in self._file_of:  # another process has just deleted its file
                return False
            by_file.setdefault(self._file_of[key], {})[key] = page
        if all(self._copy_pages(name, some) for name, some in by_file.items()):
            return True
        self._update_index()
        return False

    def store(self, loop: EngineLoop, tokens: Sequence[int]) -> None:
        """Write a file of the pages of a prompt that no file has yet. After a failed write, warn and stop storing."""
        if self._is_disabled:
            return
        with contextlib.suppress(ModelClosedError):  # closed by another thread
            self._store(loop, tokens)

    def _keys_to_store(self, engine: Engine, tokens: Sequence[int]) -> list[bytes]:
        self.refresh()
        registered = set(engine.registered_keys())
        keys = [*prefix_keys(tokens, long_rope=False), *prefix_keys(tokens, long_rope=True)]
        return [key for key in keys if key in registered and key not in self]

    def _store(self, loop: EngineLoop, tokens: Sequence[int]) -> None:
        # If a prompt exceeds the limit, its beginning is stored.
        new = loop.call(lambda engine: self._keys_to_store(engine, tokens))[: self._limit_bytes // self._kv.page_bytes]
        n_bytes = file_bytes(self._origin, len(new), self._kv.page_bytes)
        if not new or n_bytes > self._limit_bytes:
            return
        path = self.folder / (hashlib.sha256(b"".join(new)).hexdigest()[:32] + _SUFFIX)
        try:
            self._evict(n_bytes)
            with atomic_write(path, CacheError) as file:
                write_pages(file, self._origin, new, self._kv.page_bytes, loop.read_page)
            self._evict(0)  # others may have used the same room; the last writer sees all files
        except CacheError as error:
            self._is_disabled = True
            warnings.warn(f"the prefix cache on disk is disabled: {error}", RuntimeWarning, stacklevel=3)

    def _copy_pages(self, name: str, pages: Mapping[bytes, int]) -> bool:
        path = self.folder / name
        try:
            with PageFile(path, self._origin, self._kv.page_bytes) as file:
                # A writer of the same prompt that lost a page to eviction may have replaced the file by one with fewer.
                self._keys[name] = file.keys
                index_of = {key: i for i, key in enumerate(file.keys)}
                if not pages.keys() <= index_of.keys():
                    return False
                for key, page in pages.items():
                    self._kv.write_page(page, file.page(index_of[key]))
        except StateError as error:
            self._keys.pop(name, None)
            _delete_if_corrupt(path, error)
            return False
        with contextlib.suppress(OSError):
            os.utime(path)  # most recently used
        return True

    def _read_keys(self, name: str) -> None:
        path = self.folder / name
        try:
            with PageFile(path, self._origin, self._kv.page_bytes) as file:
                self._keys[name] = file.keys
        except StateError as error:
            _delete_if_corrupt(path, error)

    def _update_index(self) -> None:
        # Concurrent writers may store the same page twice; the index has one of the files.
        self._file_of = {key: name for name, keys in self._keys.items() for key in keys}

    def _evict(self, n_bytes: int) -> None:
        """Delete the least recently used files, of any origin, until n_bytes more fit the limit."""
        files = _files(self._root)
        total = sum(size for _, size, _ in files) + n_bytes
        for _, size, path in sorted(files):
            if total <= self._limit_bytes:
                break
            with contextlib.suppress(OSError):  # on Windows a mapped file cannot be deleted
                path.unlink(missing_ok=True)  # another process may have deleted it
                total -= size
        for folder in self._root.glob("*/"):
            remove_stale_parts(folder)


def _delete_if_corrupt(path: Path, error: StateError) -> None:
    if not isinstance(error, UnreadableError):
        with contextlib.suppress(OSError):
            path.unlink()


def _files(root: Path) -> list[tuple[int, int, Path]]:
    """Return (time of last use in ns, size in bytes, path) of the files of all origins."""
    files = []
    for path in root.glob(f"*/*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    return files


def open_prefix_cache(where: Literal[True] | str | os.PathLike[str], origin: Origin, engine: Engine) -> DiskPrefixCache:
    """Attach a prefix cache on disk to an engine and return it. where: its folder; True: `default_folder`.

    Raises CacheError, OptionError.
    """
    folder = default_folder() if where is True else Path(os.fspath(where)).expanduser()
    cache = DiskPrefixCache(folder, origin, engine.kv, limit_bytes())
    engine.scheduler.kv_connector = cache
    return cache


def default_folder() -> Path:
    """Return the default folder of the prefix cache, inside phi-c's cache folder."""
    return cache_dir() / "prefix"


def stored_bytes() -> int:
    """Return the total size in bytes of the files in `default_folder`."""
    return sum(size for _, size, _ in _files(default_folder()))


def limit_bytes() -> int:
    """Return the maximum total size of the files in bytes: PHI_C_PREFIX_CACHE_GIB, else 8 GiB. Raises OptionError."""
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_LIMIT_GIB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1 << 20:
        raise OptionError(f"{LIMIT_VARIABLE} is {text!r:.60}, expected a number of GiB")
    return int(limit * 2**30)
