"""Error measures, and whether a tier's results must be equal bit for bit."""

from typing import Any

import numpy as np
import numpy.typing as npt

from phi_c import _core


def nmse(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the normalised mean squared error: sum((got - expected)^2) / sum(expected^2)."""
    error = (got.astype(np.float64) - expected) ** 2
    return float(error.sum() / (expected.astype(np.float64) ** 2).sum())


def median_nmse(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the median of `nmse` over rows, for models with experts: in some rows a near tie may choose others."""
    return float(np.median([nmse(a, b) for a, b in zip(got, expected, strict=True)]))


def may_round_differently(tier: str, n_tokens: int) -> bool:
    """Return whether a batch of n_tokens may have other bits on a tier than its tokens one by one."""
    max_exact_batch = _core.max_exact_batch(tier)
    return max_exact_batch is not None and n_tokens > max_exact_batch
