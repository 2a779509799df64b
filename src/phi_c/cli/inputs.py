"""Text that verbs read from files and from stdin."""

import sys
from pathlib import Path

from phi_c.errors import OptionError


def read_text(name: str) -> str:
    """Return the text of a file, or of stdin for "-"; raises OptionError if it cannot be read or is not UTF-8."""
    if name == "-":
        return read_stdin()
    try:
        raw = Path(name).read_bytes()
    except OSError as error:
        raise OptionError(f"{name} cannot be read: {error.strerror or error}") from None
    return _decode(raw, name)


def read_stdin() -> str:
    """Return the text on stdin; raises OptionError if it is not UTF-8."""
    return _decode(sys.stdin.buffer.read(), "stdin")


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{name} is not UTF-8 text: invalid byte {raw[error.start]:#04x} at offset {error.start}"
        ) from None
