"""Time the matrix products: type x tier x tokens on one thread.

    python benchmarks/kernels.py [--rows 1024] [--cols 3072] [--tokens 1,16,256]

GB/s counts the bytes of the weights read, GMAC/s the multiplications; medians of the repetitions.
"""

import argparse
import statistics
import time

import numpy as np

from phi_c import _core


def time_product(weights: _core.Matrix, x: np.ndarray, tier: str, repetitions: int) -> float:
    """Return the median seconds of a product, after one that warms the caches up."""
    _core.matmul(weights, x, tier)
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        _core.matmul(weights, x, tier)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--cols", type=int, default=3072)
    parser.add_argument("--tokens", default="1,16,256")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tier", action="append", help="one of the tiers of this machine; all of them by default")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"{'type':6} {'tier':8} {'tokens':>6} {'us':>10} {'GB/s':>7} {'GMAC/s':>7}")
    for kind in _core.TENSOR_TYPES.values():
        n_bytes = options.rows * options.cols // kind.block_elements * kind.block_bytes
        # Bytes below 0x3c keep every half precision scale finite.
        data = rng.integers(0, 0x3C, n_bytes, dtype=np.uint8)
        weights = _core.Matrix(kind.type_id, options.rows, options.cols, data)
        for tier in options.tier or _core.tiers():
            packed = weights.packed(tier)
            for n_tokens in map(int, options.tokens.split(",")):
                x = rng.normal(size=(n_tokens, options.cols)).astype(np.float32)
                seconds = time_product(packed, x, tier, options.repetitions)
                macs = options.rows * options.cols * n_tokens
                print(
                    f"{kind.name:6} {tier:8} {n_tokens:6} {seconds * 1e6:10.0f} "
                    f"{n_bytes / seconds / 1e9:7.1f} {macs / seconds / 1e9:7.1f}"
                )


if __name__ == "__main__":
    main()
