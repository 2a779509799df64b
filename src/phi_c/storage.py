"""The cache folder, and atomic writing of files."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from phi_c.errors import CacheError, OutputError

_STALE_PART_SECONDS = 3600.0


def cache_dir() -> Path:
    """Return phi-c's cache folder: PHI_C_CACHE, otherwise phi-c in the platform's user cache folder."""
    override = os.environ.get("PHI_C_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs  # noqa: PLC0415 - not needed with PHI_C_CACHE

    return Path(platformdirs.user_cache_dir("phi-c", appauthor=False))


@contextlib.contextmanager
def atomic_write(path: Path, error: type[CacheError | OutputError] = OutputError) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at `path` only if the block completes; creates missing folders.

    The data is written to NAME.RANDOM.part in the same folder, synced to disk, then renamed. If the block raises, the
    partial file is deleted and `path` is left unchanged.

    error: the exception to raise if the file cannot be written, CacheError or OutputError.
    """
    # The name is chosen before the file is created, so that an interrupt at any point can delete it.
    part = path.parent / f"{path.name}.{secrets.token_hex(8)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as fault:
        hint = "; set PHI_C_CACHE to use another folder" if error is CacheError else ""
        raise error(f"{path} cannot be written: {fault.strerror or fault}{hint}") from None


def remove_stale_parts(folder: Path) -> None:
    """Delete partial files in `folder` older than an hour: those that killed processes left behind."""
    for path in folder.glob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_PART_SECONDS:
                path.unlink()
