"""Measures the matrix products: tensor type x tier x number of tokens, on one thread."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_c._core import TENSOR_TYPES, Matrix, matmul, tiers

N_TOKENS = (1, 4, 16, 512)
N_ROWS, N_COLS = 512, 3072  # columns as in Phi-3-mini; few rows, so that the weights stay in a CPU cache
_MAX_SECONDS = 0.5  # no further repetition begins after this time


@dataclass(frozen=True)
class KernelSpeed:
    """Speed of one product: weights [N_ROWS, N_COLS], activations [n_tokens, N_COLS]."""

    type_name: str
    tier: str
    n_tokens: int
    seconds: float  # median
    gb_s: float  # weights read, 1e9 bytes per second
    gmac_s: float  # multiply-accumulates, 1e9 per second


def measure_kernels(n_repeats: int = 5, n_tokens: tuple[int, ...] = N_TOKENS) -> Iterator[KernelSpeed]:
    """Yield the speed of every tensor type on every tier of this machine, with packed weights.

    n_repeats: repetitions, of which the median is taken. n_tokens: batch sizes.
    """
    rng = np.random.default_rng(0)
    for kind in TENSOR_TYPES.values():
        n_bytes = N_ROWS * N_COLS // kind.block_elements * kind.block_bytes
        # Bytes below 0x3c: every float16 scale is finite.
        data = rng.integers(0, 0x3C, n_bytes, dtype=np.uint8)
        for tier in tiers():
            weights = Matrix(kind.type_id, N_ROWS, N_COLS, data).packed(tier)
            for n in n_tokens:
                x = rng.normal(size=(n, N_COLS)).astype(np.float32)
                seconds = _seconds(weights, x, tier, n_repeats)
                n_macs = N_ROWS * N_COLS * n
                yield KernelSpeed(kind.name, tier, n, seconds, n_bytes / seconds / 1e9, n_macs / seconds / 1e9)


def _seconds(weights: Matrix, x: npt.NDArray[np.float32], tier: str, n_repeats: int) -> float:
    """Return the median time of a product in seconds, after one warm-up run; x: float32 [n_tokens, N_COLS]."""
    matmul(weights, x, tier)
    seconds: list[float] = []
    while len(seconds) < n_repeats and sum(seconds) < _MAX_SECONDS:
        start = time.perf_counter()
        matmul(weights, x, tier)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
