"""The packed-weight cache: packed weights in the cache folder, which later loads map instead of packing again.

File: magic [8], key [32], zeros up to 4096; the panels, as `Model.write_panels` writes them; magic, key. The key is a
hash of the model file's identity, PANEL_VERSION and the packed sizes. The cache can be deleted at any time.
"""

import hashlib
import mmap
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from phi_c._core import PANEL_VERSION
from phi_c.errors import CacheError
from phi_c.gguf.reader import GGUFFile
from phi_c.storage import atomic_write, cache_dir, remove_stale_parts

_MAGIC = b"PHIPANEL"
_HEADER_BYTES = 4096  # one page, so that the panels are aligned


class PackedCache:
    """The packed-weight cache file of one model.

    The file name depends on the model's path and the packed sizes. So tiers with the same packed layout share a file,
    and a model file that is replaced under the same path replaces its cache file.
    """

    def __init__(self, file: GGUFFile, sizes: list[int]) -> None:
        """Describe the cache file of a model; `open` and `write` access it.

        file: the model.
        sizes: packed bytes of each matrix, in file order (`Weights.packed_sizes`).
        """
        self._n_bytes = sum(sizes)
        layout = f"{PANEL_VERSION} {sys.byteorder} {sizes}".encode()
        self._signature = _MAGIC + hashlib.sha256(file.identity() + layout).digest()  # first and last bytes of the file
        name_hash = hashlib.sha256(f"{file.path.resolve()} {sizes}".encode()).hexdigest()[:16]
        self.path = cache_dir() / "packed" / f"{file.path.stem}-{name_hash}.panels"

    def open(self) -> npt.NDArray[np.uint8] | None:
        """Return the panels, uint8 [sum of sizes], mapped read-only; None without a complete, matching file.

        Only the file size, the header and the trailer are checked. The panels are trusted, as a model file's data is.
        """
        try:
            with self.path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # ValueError: an empty file
            return None
        end = _HEADER_BYTES + self._n_bytes
        if len(mapping) != end + len(self._signature) or not self._n_bytes:
            return None
        if mapping[: len(self._signature)] != self._signature or mapping[end:] != self._signature:
            return None
        return np.frombuffer(mapping, np.uint8, self._n_bytes, _HEADER_BYTES)

    def write(self, write_panels: Callable[[IO[bytes]], None]) -> Path:
        """Write the cache file and return its path; a no-op if another process has written it already.

        write_panels: writes the panels, sum of sizes bytes, to a binary file.

        Raises CacheError when the folder is not writable or the disk is full.
        """
        if self.open() is not None:
            return self.path
        remove_stale_parts(self.path.parent)
        with atomic_write(self.path, CacheError) as file:
            self._check_free_space()
            file.write(self._signature.ljust(_HEADER_BYTES, b"\0"))
            write_panels(file)
            file.write(self._signature)
        return self.path

    def _check_free_space(self) -> None:
        folder = self.path.parent
        free = shutil.disk_usage(folder).free
        if free < self._n_bytes + _HEADER_BYTES + len(self._signature):
            raise CacheError(
                f"the packed-weight cache needs {self._n_bytes / 2**30:.1f} GiB in {folder}, which has "
                f"{free / 2**30:.1f} GiB free: set PHI_C_CACHE to use another folder, or use layout packed"
            )
