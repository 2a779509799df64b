"""How fast memory is read: what bounds the speed at which one text is generated."""

from phi_c import machine
from phi_c._core import read_bandwidth

_MAX_READ_BYTES = 512 << 20  # above the caches of most machines
_MIN_READ_BYTES = 16 << 20


def read_rate(n_threads: int) -> float | None:
    """Return the bytes per second that n_threads read from memory, or None when there is no room to try."""
    n_bytes = min(_MAX_READ_BYTES, machine.memory_available() // 4)
    if n_bytes < _MIN_READ_BYTES:
        return None
    try:
        return read_bandwidth(n_threads, n_bytes)
    except MemoryError:
        return None
