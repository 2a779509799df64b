"""Builds GGUF files byte by byte, so that tests can write files that no writer produces."""

import struct
from collections.abc import Sequence
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"}
CODES |= {U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(type_id: int, content: Any) -> bytes:
    """Return an encoded value without its type. The content of an array is (element type, list of elements)."""
    if type_id == STRING:
        return string(content)
    if type_id == ARRAY:
        element_type, items = content
        body = b"".join(value(element_type, item) for item in items)
        return struct.pack("<IQ", element_type, len(items)) + body
    return struct.pack("<" + CODES[type_id], content)


def key(name: str, type_id: int, content: Any) -> bytes:
    return string(name) + struct.pack("<I", type_id) + value(type_id, content)


def tensor(name: str, ne: Sequence[int], type_id: int = 0, offset: int = 0) -> bytes:
    """Return an entry of the tensor table. ne: dimensions in GGUF's order, the row length first."""
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, type_id, offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Return a whole file. n_tensors, n_keys: counts in the header; None: the real counts."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % alignment) + data
