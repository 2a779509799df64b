"""phi-c's own cache folder."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from phi_c.errors import CacheError

_ABANDONED_SECONDS = 3600.0


def cache_dir() -> Path:
    """Return the folder: PHI_C_CACHE, else the system's place for a user's caches."""
    override = os.environ.get("PHI_C_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs  # noqa: PLC0415 - for a default that is often not needed

    return Path(platformdirs.user_cache_dir("phi-c", appauthor=False))


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when it was written to its end.

    Raises CacheError when the folder cannot be written.
    """
    # Named before it is there, so that an interrupt at any moment leaves nothing behind.
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
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written: {error.strerror or error}; PHI_C_CACHE names another folder"
        ) from None


def remove_abandoned(folder: Path) -> None:
    """Delete what processes that were killed while they wrote a file in a folder have left there."""
    for path in folder.glob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
