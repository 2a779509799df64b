"""Damaged copies of a file, for tests of a reader that must refuse them with grace."""

import random
from collections.abc import Callable, Iterator

# Counts and offsets that overflow, wrap, or name more than there is.
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
    """Yield n damaged copies of data, the same for the same seed.

    Of the first header_bytes, copies have bits flipped, bytes set to 0 or 0xff, or 8 bytes replaced by a huge
    number (half of these in place of 8 bytes that hold a small one: a count, a length or an offset). Others
    are cut short anywhere.
    """
    rng = random.Random(seed)  # any seed will do, no secret
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
    """Return where the header holds 8 bytes that read as a number from 1 to 65535."""
    return [at for at in range(header_bytes - 7) if data[at + 2 : at + 8] == bytes(6) and data[at : at + 2] != bytes(2)]
