"""Metrics of one model's logits against another's, and standard errors.

Depends on NumPy only: benchmarks load this file in the interpreters of other engines.
"""

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_MAX_CHUNK_VALUES = 1 << 18  # logits converted to float64 at a time


def log_softmax(logits: Floats) -> Doubles:
    """Return log-probabilities in nats: float64 [n_tokens, n_vocab]."""
    shifted: Doubles = logits.astype(np.float64) - logits.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def perplexity_of(nll: float) -> float:
    """Return exp of a mean negative log-likelihood; infinity if it exceeds the range of float64."""
    return math.exp(nll) if nll < math.log(sys.float_info.max) else math.inf


def token_metrics(reference: Floats, logits: Floats, next_tokens: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Compare logits with reference logits after each token; both are float32 [n, n_vocab].

    next_tokens: ids of the tokens that follow, [n_next] with n_next <= n.

    Returns kl: KL(reference || logits) in nats, [n]; top1_agreement: whether both have the same most probable token,
    bool [n]; nll, reference_nll: negative log-likelihood of the next token in nats, [n_next].
    """
    parts: dict[str, list[npt.NDArray[Any]]] = {"kl": [], "top1_agreement": [], "nll": [], "reference_nll": []}
    chunk = max(_MAX_CHUNK_VALUES // logits.shape[1], 1)
    for start in range(0, len(logits), chunk):
        rows = slice(start, start + chunk)
        p, q = log_softmax(reference[rows]), log_softmax(logits[rows])
        parts["kl"].append((np.exp(p) * (p - q)).sum(1))
        parts["top1_agreement"].append(p.argmax(1) == q.argmax(1))
        next_ids = next_tokens[rows]
        scored = np.arange(len(next_ids))
        parts["nll"].append(-q[scored, next_ids])
        parts["reference_nll"].append(-p[scored, next_ids])
    return {name: np.concatenate(values) for name, values in parts.items()}


def standard_error(sums: npt.ArrayLike, counts: npt.ArrayLike) -> float:
    """Return the standard error of the mean of all values, from the sum and the number of values of each window.

    Windows are taken as independent, the values within a window are not. With the mean m, window sums S_w and counts
    n_w, W windows and N values, it is sqrt(W / (W - 1) * sum((S_w - m * n_w)^2)) / N, the standard error of a ratio
    estimator (Cochran, Sampling Techniques, 6.4). For windows of equal size it is the standard error of the mean of
    their means. NaN for a single window.
    """
    s, n = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if len(s) < 2:
        return math.nan
    residuals = s - s.sum() / n.sum() * n
    return float(np.sqrt(len(s) / (len(s) - 1) * (residuals**2).sum()) / n.sum())
