"""The header of a GGUF file, version 3, little endian (docs/gguf.md of ggml)."""

import struct
from collections.abc import Iterable, Mapping

from phi_c.gguf.reader import MAGIC

_VERSION = 3
_U32, _STRING = 4, 8  # value types


def u32(value: int) -> bytes:
    """Return a metadata value, its type before it."""
    return struct.pack("<II", _U32, value)


def text(value: str) -> bytes:
    """Return a metadata value, its type before it."""
    return struct.pack("<I", _STRING) + _string(value)


def header(
    metadata: Mapping[str, bytes], tensors: Iterable[tuple[str, tuple[int, ...], int, int]], alignment: int
) -> bytes:
    """Return all that precedes tensor data, which begins behind it, each tensor at the next multiple of alignment.

    metadata: values with their types; tensors: name, row-major shape, type id and bytes of each, in their order.
    """
    entries = []
    offset = 0
    for name, shape, type_id, n_bytes in tensors:
        entries.append(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        entries.append(struct.pack("<IQ", type_id, offset))
        offset += n_bytes + padding(n_bytes, alignment)
    start = MAGIC + struct.pack("<IQQ", _VERSION, len(entries) // 2, len(metadata))
    whole = start + b"".join(_string(key) + value for key, value in metadata.items()) + b"".join(entries)
    return whole + bytes(padding(len(whole), alignment))


def padding(n_bytes: int, alignment: int) -> int:
    """Return the bytes that are missing to a multiple of alignment."""
    return -n_bytes % alignment


def _string(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
