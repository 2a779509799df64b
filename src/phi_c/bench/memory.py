"""Measures the read bandwidth of memory, which bounds the decode speed."""

from phi_c import machine
from phi_c._core import read_bandwidth

_MAX_READ_BYTES = 512 << 20  # larger than most CPU caches
_MIN_READ_BYTES = 16 << 20


def read_rate(n_threads: int) -> float | None:
    """Return the read bandwidth of n_threads threads in bytes per second; None if too little memory is free."""
    n_bytes = min(_MAX_READ_BYTES, machine.memory_available() // 4)
    if n_bytes < _MIN_READ_BYTES:
        return None
    try:
        return read_bandwidth(n_threads, n_bytes)
    except MemoryError:
        return None
