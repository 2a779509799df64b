"""Chooses the next token of one sequence from its logits, and computes log-probabilities."""

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_c.errors import OptionError, PhiError
from phi_c.sampling.params import SamplingParams

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_SMALL = 1024  # number of values that are sorted, or scanned one by one; more are divided first
_CHUNK = 1 << 14  # number of values whose temporary copies fit a core's cache
_BIN_BITS = 12  # the number of bins is 1 << _BIN_BITS
_ONE_BITS = np.int32(0x3F800000)  # 1.0 as float32 bits


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability: natural logarithm, under the model itself, before any sampling option applies."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob) of the most probable tokens, in descending order


class Sampler:
    """Samples the tokens of one sequence. Random numbers depend only on the seed and the number of earlier draws.

    seed: that of the parameters, or the random one that was chosen.
    """

    def __init__(self, params: SamplingParams, n_vocab: int) -> None:
        self.params = params
        out_of_range = [token for token in params.logit_bias if token >= n_vocab]
        if out_of_range:
            raise OptionError(f"logit_bias names token {out_of_range[0]}, expected ids of 0 to {n_vocab - 1}")
        # Reused by every call: zeroing the pages of a fresh array costs more than the computation.
        self._buffer = np.empty(n_vocab, np.float32)
        # 53 bits: exact in JSON, whose readers may have floats only.
        self.seed = secrets.randbits(53) if params.seed is None else params.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: Floats, generated: Sequence[int]) -> int:
        """Return the id of the next token.

        logits: float32 [n_vocab], not modified.
        generated: ids of the tokens generated so far, without the prompt.

        Raises PhiError if the largest logit is not finite.
        """
        logits = self._adjust_logits(logits, generated)
        top = _check_finite(logits, int(logits.argmax()))
        temperature = np.float32(self.params.temperature)
        if temperature <= 0:
            return top
        ids, weights = self._candidates(logits, logits[top], temperature)
        uniform = self._random.random()
        top_p = self.params.top_p
        index = _draw_top_p(weights, top_p, uniform) if 0 < top_p < 1 else _draw(weights, uniform)
        return int(index if ids is None else ids[index])

    def _adjust_logits(self, logits: Floats, generated: Sequence[int]) -> Floats:
        """Return the logits with penalties and logit_bias applied: in self._buffer, or `logits` itself if unchanged."""
        p = self.params
        start = 0 if p.repeat_last_n < 0 else len(generated) - p.repeat_last_n
        recent = generated[max(start, 0) :]
        has_penalty = p.repeat_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        if not p.logit_bias and not (has_penalty and recent):
            return logits
        np.copyto(self._buffer, logits)
        logits = self._buffer
        if has_penalty and recent:
            occurrences = Counter(recent)
            tokens = np.fromiter(occurrences.keys(), np.int64, len(occurrences))
            counts = np.fromiter(occurrences.values(), np.float32, len(occurrences))
            values = logits[tokens]
            values = np.where(values >= 0, values / p.repeat_penalty, values * p.repeat_penalty)
            logits[tokens] = values - p.presence_penalty - p.frequency_penalty * counts
        for token, bias in p.logit_bias.items():
            logits[token] += bias
        return logits

    def _candidates(self, logits: Floats, largest: np.float32, temperature: np.float32) -> tuple[Ids | None, Floats]:
        """Apply temperature, top_k and min_p. Return the candidates' ids (None: the whole vocabulary) and weights.

        Weights are probabilities relative to the most probable token, whose weight is 1. A token that min_p drops may
        remain with weight 0.
        """
        p = self.params
        ids = None
        if p.top_k:
            ids = _top_indices(logits, p.top_k)
        elif p.min_p > 0:
            # Most tokens are dropped before exp; the margin covers the rounding of tokens near the threshold.
            bound = float(largest) + float(temperature) * (math.log(p.min_p) - 1e-4) - 1e-6 * abs(float(largest))
            is_candidate = logits >= np.float32(bound)
            if np.count_nonzero(is_candidate) < len(logits) // 8:
                ids = np.flatnonzero(is_candidate)
        weights: Floats = self._buffer if ids is None else logits[ids]
        np.subtract(logits if ids is None else weights, largest, out=weights)
        np.divide(weights, temperature, out=weights)
        np.exp(weights, out=weights)
        if p.min_p > 0:
            weights[weights < p.min_p] = 0
        return ids, weights


def _draw(weights: Floats, uniform: float) -> int:
    """Return the first index at which the cumulative weight exceeds `uniform` (0 to 1) times the total."""
    starts = np.arange(0, len(weights), _SMALL)
    cumulative = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    target = uniform * cumulative[-1]
    block = int(cumulative[:-1].searchsorted(target, side="right"))
    before = cumulative[block - 1] if block else 0.0
    within = before + weights[starts[block] : starts[block] + _SMALL].cumsum(dtype=np.float64)
    return int(starts[block] + within[:-1].searchsorted(target, side="right"))


def _draw_top_p(weights: Floats, top_p: float, uniform: float) -> int:
    """Draw an index from the largest weights, up to the first whose cumulative share reaches `top_p`.

    weights: float32, 0 to 1. Equal weights are ordered by index.
    uniform: random number, 0 to 1.

    The result is that of sorting all weights. More than _SMALL weights are put into bins instead, and at most two bins
    are sorted: the one in which the cumulative weight reaches top_p, and the one that is drawn from.
    """
    if len(weights) <= _SMALL:
        order = np.argsort(-weights, kind="stable")
        within = weights[order].cumsum(dtype=np.float64)
        last = int(within[:-1].searchsorted(top_p * within[-1]))
        return int(order[within[:last].searchsorted(uniform * within[last], side="right")])
    bits = weights.view(np.int32)  # the bits of positive floats order as the floats do
    shift = max(int(_ONE_BITS - bits.min()).bit_length() - _BIN_BITS, 0)
    sums = np.zeros(1 << _BIN_BITS)
    for start in range(0, len(weights), _CHUNK):
        part = slice(start, start + _CHUNK)
        sums += np.bincount((_ONE_BITS - bits[part]) >> shift, weights[part], len(sums))
    cumulative = sums.cumsum()

    def sort_bin(bin_index: int) -> tuple[Ids, npt.NDArray[np.float64]]:
        """Return the indices of the bin's weights, largest first, and the cumulative weight at each."""
        upper = int(_ONE_BITS) - (bin_index << shift)
        members = np.flatnonzero((bits <= upper) & (bits > upper - (1 << shift)))
        members = members[np.argsort(-weights[members], kind="stable")]
        before = cumulative[bin_index - 1] if bin_index else 0.0
        return members, before + weights[members].cumsum(dtype=np.float64)

    last_bin = int(cumulative.searchsorted(top_p * cumulative[-1]))
    members, within = sort_bin(last_bin)
    last = int(within[:-1].searchsorted(top_p * cumulative[-1]))
    target = uniform * within[last]
    drawn_bin = int(cumulative[:last_bin].searchsorted(target, side="right"))
    if drawn_bin < last_bin:
        members, within = sort_bin(drawn_bin)
        last = len(members) - 1
    return int(members[within[:last].searchsorted(target, side="right")])


def _top_indices(values: Floats, n: int) -> Ids:
    """Return the indices of the n largest values, in descending order of value; equal values are ordered by index.

    The values are divided into groups; at least n values are not below the n-th largest group maximum, and few more.
    """
    n_groups = max(_SMALL, 8 * n)
    n_rows = len(values) // n_groups
    if n_rows < 2:
        candidates = np.arange(len(values))
    else:
        maxima = values[: n_rows * n_groups].reshape(n_rows, n_groups).max(axis=0)
        candidates = np.flatnonzero(values >= np.partition(maxima, n_groups - n)[n_groups - n])
    return candidates[np.argsort(-values[candidates], kind="stable")[:n]]


def _check_finite(logits: Floats, top: int) -> int:
    # argmax returns a NaN if there is one.
    if not np.isfinite(logits[top]):
        raise PhiError(f"the logits hold {logits[top]}: the model's weights are corrupt, or every token is banned")
    return top


def logprob(logits: Floats, token: int, n_top: int) -> TokenLogprob:
    """Return the log-probability of a token and of the n_top most probable tokens. logits: float32 [n_vocab]."""
    largest = float(logits.max())
    log_sum_exp = largest + math.log(np.exp(logits - np.float32(largest)).sum(dtype=np.float64))
    top = _top_indices(logits, n_top) if n_top else ()
    return TokenLogprob(
        token=token,
        logprob=float(logits[token]) - log_sum_exp,
        top=tuple((int(i), float(logits[i]) - log_sum_exp) for i in top),
    )
