"""A packed-weight cache: packed weights kept in the cache folder, which the next start maps instead of packing again.

magic [8], key [32], zeros up to 4096; panels, as a model holds them; magic, key. The key is the model file's identity,
the version of the packed layout and what is packed. A file may be deleted at any time; it is written again.
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
_HEADER_BYTES = 4096  # a page: panels begin aligned


class PackedCache:
    """The place of a model's packed weights; sizes are the bytes of each matrix, in the order in which they lie.

    Its name tells the model's path and the sizes, so tiers that pack alike share it, and a model file that was replaced
    replaces it.
    """

    def __init__(self, file: GGUFFile, sizes: list[int]) -> None:
        self._n_bytes = sum(sizes)
        layout = f"{PANEL_VERSION} {sys.byteorder} {sizes}".encode()
        self._mark = _MAGIC + hashlib.sha256(file.identity() + layout).digest()
        place = hashlib.sha256(f"{file.path.resolve()} {sizes}".encode()).hexdigest()[:16]
        self.path = cache_dir() / "packed" / f"{file.path.stem}-{place}.panels"

    def open(self) -> npt.NDArray[np.uint8] | None:
        """Return the panels, uint8 [sum of sizes], mapped read-only; None where there is no whole file that fits.

        Only size, beginning and end are looked at: the middle of a file is trusted, as that of a model's file is.
        """
        try:
            with self.path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # ValueError: an empty file
            return None
        end = _HEADER_BYTES + self._n_bytes
        if len(mapping) != end + len(self._mark) or not self._n_bytes:
            return None
        if mapping[: len(self._mark)] != self._mark or mapping[end:] != self._mark:
            return None
        return np.frombuffer(mapping, np.uint8, self._n_bytes, _HEADER_BYTES)

    def write(self, write_panels: Callable[[IO[bytes]], None]) -> Path:
        """Keep what write_panels writes, unless another process was faster, and return where.

        Raises CacheError when the folder cannot be written or has no room.
        """
        if self.open() is not None:
            return self.path
        remove_stale_parts(self.path.parent)
        with atomic_write(self.path, CacheError) as file:
            self._check_room()
            file.write(self._mark.ljust(_HEADER_BYTES, b"\0"))
            write_panels(file)
            file.write(self._mark)
        return self.path

    def _check_room(self) -> None:
        folder = self.path.parent
        free = shutil.disk_usage(folder).free
        if free < self._n_bytes + _HEADER_BYTES + len(self._mark):
            raise CacheError(
                f"packed weights of {self._n_bytes / 2**30:.1f} GiB do not fit {folder}, {free / 2**30:.1f} GiB are "
                "free: set PHI_C_CACHE to use another folder, layout packed needs none"
            )
