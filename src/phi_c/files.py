"""Files that a user asks for appear whole, or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from phi_c.errors import OutputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when it was written to its end.

    Raises OutputError when its folder cannot be written; what fails inside for another reason passes through.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("xb")
    except OSError as error:
        raise _cannot(path, error) from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _cannot(path, error) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _cannot(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror or error}")
