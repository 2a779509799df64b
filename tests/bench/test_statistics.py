"""Medians and their intervals."""

import numpy as np
import pytest

from phi_c.bench.statistics import median_interval, paired_ratio


@pytest.mark.parametrize(
    ("n", "rank"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (15, 4), (20, 6), (25, 8), (100, 40)]
)
def test_ranks_are_those_of_published_tables(n: int, rank: int) -> None:
    """The rank of the lower end for 95 %, as in tables of distribution-free intervals of the median."""
    samples = [float(i) for i in np.random.default_rng(n).permutation(n) + 1]
    assert median_interval(samples) == ((n + 1) / 2, rank, n + 1 - rank)


def test_the_interval_holds_the_median_in_95_of_100_runs() -> None:
    samples = np.random.default_rng(0).lognormal(size=(4000, 15))
    intervals = [median_interval(list(row)) for row in samples]
    inside = sum(low <= 1 <= high for _, low, high in intervals) / len(intervals)
    assert 0.95 < inside < 0.98  # 15 samples: 96.5 %


def test_paired_ratio_cancels_a_drift_that_both_share() -> None:
    drift = np.linspace(1, 3, 15)
    assert paired_ratio(list(2 * drift), list(drift)) == pytest.approx((2, 2, 2))


def test_errors() -> None:
    with pytest.raises(ValueError, match="no samples, expected at least 1"):
        median_interval([])
    with pytest.raises(ValueError, match="2 and 1 samples, expected pairs"):
        paired_ratio([1, 2], [1])
