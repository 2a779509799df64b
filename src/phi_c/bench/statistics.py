"""Medians of samples with intervals that assume no distribution."""

import math
from collections.abc import Sequence

_CONFIDENCE = 0.95


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return (median, low, high): the median of samples and its 95 % confidence interval, by order statistics.

    samples: independent, at least one. low and high are the closest pair of symmetric order statistics that enclose the
    median of the distribution with a probability of 95 %; fewer than 6 samples give the smallest and the largest.

    Raises ValueError if there are no samples.
    """
    if not samples:
        raise ValueError("no samples, expected at least 1")
    ordered = sorted(samples)
    n = len(ordered)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    skipped = _n_outside(n)
    return median, ordered[skipped], ordered[n - 1 - skipped]


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return (median, low, high) of the ratios a[i] / b[i] of samples measured in turns; see median_interval.

    a, b: the same number of samples, b positive. Raises ValueError if the numbers differ or are 0.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} samples, expected pairs")
    return median_interval([x / y for x, y in zip(a, b, strict=True)])


def _n_outside(n: int) -> int:
    """Return how many of n ordered samples are outside the interval on each side.

    The number of samples below the median is binomial with p = 1/2. The interval without the k smallest and the k
    largest samples misses the median with probability 2 * P(at most k).
    """
    k, missed = 0, 2 / 2**n
    while True:
        missed += 2 * math.comb(n, k + 1) / 2**n
        if missed > 1 - _CONFIDENCE:
            return k
        k += 1
