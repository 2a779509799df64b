"""Times the matrix products one by one: type x tier x tokens, on one thread."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_c._core import TENSOR_TYPES, Matrix, matmul, tiers

N_TOKENS = (1, 4, 16, 512)
N_ROWS, N_COLS = 512, 3072  # the columns of Phi-3-mini; few rows: what is timed is the kernel, not memory
_ENOUGH_SECONDS = 0.5  # of repetitions, where one takes long


@dataclass(frozen=True)
class KernelSpeed:
    """One product, [N_ROWS, N_COLS] times [N_COLS, n_tokens]."""

    type_name: str
    tier: str
    n_tokens: int
    seconds: float  # median
    gb_s: float  # 1e9 bytes of weights read a second
    gmac_s: float  # 1e9 multiplications a second


def measure_kernels(n_repeats: int = 5, n_tokens: tuple[int, ...] = N_TOKENS) -> Iterator[KernelSpeed]:
    """Yield the speed of every type on every tier of this machine, in the layout that the tier likes best."""
    rng = np.random.default_rng(0)
    for kind in TENSOR_TYPES.values():
        n_bytes = N_ROWS * N_COLS // kind.block_elements * kind.block_bytes
        # Bytes below 0x3c keep every half precision scale finite.
        data = rng.integers(0, 0x3C, n_bytes, dtype=np.uint8)
        for tier in tiers():
            weights = Matrix(kind.type_id, N_ROWS, N_COLS, data).packed(tier)
            for n in n_tokens:
                x = rng.normal(size=(n, N_COLS)).astype(np.float32)
                seconds = _seconds(weights, x, tier, n_repeats)
                n_macs = N_ROWS * N_COLS * n
                yield KernelSpeed(kind.name, tier, n, seconds, n_bytes / seconds / 1e9, n_macs / seconds / 1e9)


def _seconds(weights: Matrix, x: npt.NDArray[np.float32], tier: str, n_repeats: int) -> float:
    """Return the median seconds of a product, after one that warms the caches up; x float32 [n_tokens, n_cols]."""
    matmul(weights, x, tier)
    seconds: list[float] = []
    while len(seconds) < n_repeats and sum(seconds) < _ENOUGH_SECONDS:
        start = time.perf_counter()
        matmul(weights, x, tier)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
