"""Distances between two models' logits, and errors of means. NumPy only: other engines' interpreters load this file."""

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_VALUES_AT_ONCE = 1 << 18  # of logits in float64


def log_softmax(logits: Floats) -> Doubles:
    """Return natural logarithms of probabilities, float64 [n_tokens, n_vocab]."""
    shifted: Doubles = logits.astype(np.float64) - logits.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def perplexity_of(nll: float) -> float:
    """Return exp of a mean negative log-likelihood: infinite where no float64 holds it."""
    return math.exp(nll) if nll < math.log(sys.float_info.max) else math.inf


def distances(expected: Floats, logits: Floats, following: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Compare logits, float32 [n, n_vocab], with expected ones; following [n or less]: the token after each position.

    kl: KL(expected || logits) in nats, [n]; top1_agreement: whether the likeliest token is the same, [n]; nll, reference_nll:
    minus the log-probability of the token that follows, [len(following)].
    """
    parts: dict[str, list[npt.NDArray[Any]]] = {"kl": [], "top1_agreement": [], "nll": [], "reference_nll": []}
    n_at_once = max(_VALUES_AT_ONCE // logits.shape[1], 1)
    for start in range(0, len(logits), n_at_once):
        rows = slice(start, start + n_at_once)
        p, q = log_softmax(expected[rows]), log_softmax(logits[rows])
        parts["kl"].append((np.exp(p) * (p - q)).sum(1))
        parts["top1_agreement"].append(p.argmax(1) == q.argmax(1))
        next_ids = following[rows]
        known = np.arange(len(next_ids))
        parts["nll"].append(-q[known, next_ids])
        parts["reference_nll"].append(-p[known, next_ids])
    return {name: np.concatenate(values) for name, values in parts.items()}


def standard_error(sums: npt.ArrayLike, counts: npt.ArrayLike) -> float:
    """Return the standard error of the mean of all values, given each window's sum and number of values.

    Values of a window depend on one another, windows do not: with m the mean, S_w and n_w a window's sum and count, W
    windows and N values, it is sqrt(W / (W - 1) * sum((S_w - m * n_w)^2)) / N, the error of a ratio estimator (Cochran,
    Sampling Techniques, 6.4). With windows of one size it is that of the mean of their means. NaN for one window.
    """
    s, n = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if len(s) < 2:
        return math.nan
    rest = s - s.sum() / n.sum() * n
    return float(np.sqrt(len(s) / (len(s) - 1) * (rest**2).sum()) / n.sum())
