"""The cache folder, and files that appear whole or not at all."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from phi_c.errors import CacheError, OutputError

_STALE_SECONDS = 3600.0


def cache_dir() -> Path:
    """Return phi-c's cache folder: PHI_C_CACHE, or the platform's user cache folder."""
    override = os.environ.get("PHI_C_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs  # noqa: PLC0415 - only the default needs it

    return Path(platformdirs.user_cache_dir("phi-c", appauthor=False))


@contextlib.contextmanager
def atomic_write(path: Path, error: type[CacheError | OutputError] = OutputError) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at `path` only if the block completes.

    The data goes to NAME.RANDOM.part in the same folder, is fsynced and renamed. An exception in the block deletes it.
    Raises `error` (CacheError or OutputError) if the file cannot be written.
    """
    # The name is chosen before the file exists, so an interrupt at any point leaves nothing behind.
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
    """Delete the partial files in `folder` that killed processes left behind more than an hour ago."""
    for path in folder.glob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
