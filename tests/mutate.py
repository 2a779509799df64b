"""Corrupts copies of a file, for tests of a reader that must reject them with a PhiError."""

import random
from collections.abc import Callable, Iterator

# Counts and offsets that overflow, wrap around, or exceed the file.
HUGE = (
    2**64 - 1,
    2**63,
    2**63 - 1,
    2**62 + 1,
    2**61,
    2**48,
    2**32,
    2**31,
    2**31 - 1,
    2**24 + 1,
    0xFFFF,
    256,
    0,
)


def mutations(data: bytes, header_bytes: int, seed: int, n: int) -> Iterator[bytes]:
    """Yield n corrupt copies of data; the same seed gives the same copies.

    In turn, a copy has bits of its first header_bytes flipped, has bytes there set to 0 or 0xff, has 8 bytes there
    replaced by a number of HUGE, or is truncated anywhere. Half of the replaced numbers are counts, lengths or offsets.
    """
    rng = random.Random(seed)
    counts = small_counts(data, header_bytes)

    def flip_bits(copy: bytearray) -> None:
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            copy[rng.randrange(header_bytes)] ^= 1 << rng.randrange(8)

    def overwrite_bytes(copy: bytearray) -> None:
        start = rng.randrange(header_bytes)
        end = min(start + rng.choice((1, 1, 2, 4, 8, 16)), header_bytes)
        copy[start:end] = bytes([rng.choice((0, 0xFF))]) * (end - start)

    def overwrite_count(copy: bytearray) -> None:
        start = rng.choice(counts) if counts and rng.random() < 0.5 else rng.randrange(max(1, header_bytes - 7))
        copy[start : start + 8] = rng.choice(HUGE).to_bytes(8, "little")

    def truncate(copy: bytearray) -> None:
        end = header_bytes if rng.random() < 0.5 else len(copy)
        del copy[rng.randrange(end) :]

    kinds: tuple[Callable[[bytearray], None], ...] = (flip_bits, overwrite_bytes, overwrite_count, truncate)
    for i in range(n):
        copy = bytearray(data)
        kinds[i % len(kinds)](copy)
        yield bytes(copy)


def small_counts(data: bytes, header_bytes: int) -> list[int]:
    """Return the offsets of 8 bytes in the header that are an integer from 1 to 65535."""
    return [i for i in range(header_bytes - 7) if data[i + 2 : i + 8] == bytes(6) and data[i : i + 2] != bytes(2)]
