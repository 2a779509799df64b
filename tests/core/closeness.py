"""How near two results must be on a tier: the same bits, or an error that rounding explains."""

from typing import Any

import numpy as np
import numpy.typing as npt

from phi_c import _core


def nmse(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the squared error as a share of the squared signal."""
    error = (got.astype(np.float64) - expected) ** 2
    return float(error.sum() / (expected.astype(np.float64) ** 2).sum())


def typical_nmse(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the median over rows of `nmse`: of models whose experts may change with a near tie in some rows."""
    return float(np.median([nmse(a, b) for a, b in zip(got, expected, strict=True)]))


def rounds_anew(tier: str, n_tokens: int) -> bool:
    """Return whether products of as many tokens may round otherwise on a tier than those of one token do."""
    few = _core.max_exact_batch(tier)
    return few is not None and n_tokens > few
