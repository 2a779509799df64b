"""Chooses the next token of one sequence."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_c.errors import OptionError, PhiError
from phi_c.sampling.params import SamplingParams

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_FEW = 1024  # values that are looked at one by one, or sorted, without a thought
_CHUNK = 1 << 14  # values whose copies stay in a core's cache
_BIN_BITS = 12  # of the number of bins
_ONE_BITS = np.int32(0x3F800000)  # of 1.0 in float32


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability under the model, before any sampling option."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, the first the likeliest


class Sampler:
    """Draws tokens; its random numbers depend on the seed and on how many it drew, on nothing else."""

    def __init__(self, params: SamplingParams, n_vocab: int) -> None:
        self.params = params
        beyond = [token for token in params.logit_bias if token >= n_vocab]
        if beyond:
            raise OptionError(f"logit_bias names token {beyond[0]}, the vocabulary ends at {n_vocab - 1}")
        # Fresh memory of this size costs more than what is computed in it: the system zeroes each page.
        self._work = np.empty(n_vocab, np.float32)
        self._random = np.random.Generator(np.random.PCG64(params.seed))

    def sample(self, logits: Floats, generated: Sequence[int]) -> int:
        """Return the next token id; logits float32 [n_vocab], generated: the ids so far, without the prompt."""
        logits = self._adjusted(logits, generated)
        top = _checked(logits, int(logits.argmax()))
        temperature = np.float32(self.params.temperature)
        if temperature <= 0:
            return top
        kept, weights = self._filtered(logits, logits[top], temperature)
        draw = self._random.random()
        share = self.params.top_p
        drawn = _draw_likeliest(weights, share, draw) if 0 < share < 1 else _draw(weights, draw)
        return int(drawn if kept is None else kept[drawn])

    def _adjusted(self, logits: Floats, generated: Sequence[int]) -> Floats:
        p = self.params
        start = 0 if p.repeat_last_n < 0 else len(generated) - p.repeat_last_n
        recent = generated[max(start, 0) :]
        has_penalty = p.repeat_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        if not p.logit_bias and not (has_penalty and recent):
            return logits
        np.copyto(self._work, logits)
        logits = self._work
        if has_penalty and recent:
            times = Counter(recent)
            tokens = np.fromiter(times.keys(), np.int64, len(times))
            counts = np.fromiter(times.values(), np.float32, len(times))
            values = logits[tokens]
            values = np.where(values >= 0, values / p.repeat_penalty, values * p.repeat_penalty)
            logits[tokens] = values - p.presence_penalty - p.frequency_penalty * counts
        for token, bias in p.logit_bias.items():
            logits[token] += bias
        return logits

    def _filtered(self, logits: Floats, largest: np.float32, temperature: np.float32) -> tuple[Ids | None, Floats]:
        """Return the token ids that top_k and min_p leave, None for all, and their weights; the likeliest one's is 1.

        What min_p drops may be left in with weight 0.
        """
        p = self.params
        kept = None
        if p.top_k:
            kept = _largest(logits, p.top_k)
        elif p.min_p > 0:
            # Most tokens need no exponential; the margin is for the rounding of those near the edge.
            bound = float(largest) + float(temperature) * (math.log(p.min_p) - 1e-4) - 1e-6 * abs(float(largest))
            above = logits >= np.float32(bound)
            if np.count_nonzero(above) < len(logits) // 8:
                kept = np.flatnonzero(above)
        weights: Floats = self._work if kept is None else logits[kept]
        np.subtract(logits if kept is None else weights, largest, out=weights)
        np.divide(weights, temperature, out=weights)
        np.exp(weights, out=weights)
        if p.min_p > 0:
            weights[weights < p.min_p] = 0
        return kept, weights


def _draw(weights: Floats, draw: float) -> int:
    """Return the index at which the share `draw`, of 0 to 1, of all weights is passed."""
    starts = np.arange(0, len(weights), _FEW)
    cumulative = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    target = draw * cumulative[-1]
    block = int(cumulative[:-1].searchsorted(target, side="right"))
    before = cumulative[block - 1] if block else 0.0
    within = before + weights[starts[block] : starts[block] + _FEW].cumsum(dtype=np.float64)
    return int(starts[block] + within[:-1].searchsorted(target, side="right"))


def _draw_likeliest(weights: Floats, share: float, draw: float) -> int:
    """Draw among the likeliest up to the one that crosses a share of all weights; ties in the order of their indices.

    Weights are at most 1. Many are put into bins, of which two are sorted: the one that holds the crossing, and the one
    that is drawn from.
    """
    if len(weights) <= _FEW:
        order = np.argsort(-weights, kind="stable")
        within = weights[order].cumsum(dtype=np.float64)
        crossing = int(within[:-1].searchsorted(share * within[-1]))
        return int(order[within[:crossing].searchsorted(draw * within[crossing], side="right")])
    bits = weights.view(np.int32)  # those of positive floats are in the order of their values
    shift = max(int(_ONE_BITS - bits.min()).bit_length() - _BIN_BITS, 0)
    sums = np.zeros(1 << _BIN_BITS)
    for start in range(0, len(weights), _CHUNK):
        part = slice(start, start + _CHUNK)
        sums += np.bincount((_ONE_BITS - bits[part]) >> shift, weights[part], len(sums))
    cumulative = sums.cumsum()

    def sorted_bin(index: int) -> tuple[Ids, npt.NDArray[np.float64]]:
        most = int(_ONE_BITS) - (index << shift)
        of_bin = np.flatnonzero((bits <= most) & (bits > most - (1 << shift)))
        of_bin = of_bin[np.argsort(-weights[of_bin], kind="stable")]
        before = cumulative[index - 1] if index else 0.0
        return of_bin, before + weights[of_bin].cumsum(dtype=np.float64)

    crossed = int(cumulative.searchsorted(share * cumulative[-1]))
    of_bin, within = sorted_bin(crossed)
    crossing = int(within[:-1].searchsorted(share * cumulative[-1]))
    target = draw * within[crossing]
    drawn = int(cumulative[:crossed].searchsorted(target, side="right"))
    if drawn < crossed:
        of_bin, within = sorted_bin(drawn)
        crossing = len(of_bin) - 1
    return int(of_bin[within[:crossing].searchsorted(target, side="right")])


def _largest(values: Floats, n: int) -> Ids:
    """Return the indices of the n largest values, the largest first, ties by index.

    The n-th largest of the maxima of groups is a bound that n values at least reach, and few more.
    """
    n_groups = max(_FEW, 8 * n)
    n_rows = len(values) // n_groups
    if n_rows < 2:
        candidates = np.arange(len(values))
    else:
        maxima = values[: n_rows * n_groups].reshape(n_rows, n_groups).max(axis=0)
        candidates = np.flatnonzero(values >= np.partition(maxima, n_groups - n)[n_groups - n])
    return candidates[np.argsort(-values[candidates], kind="stable")[:n]]


def _checked(logits: Floats, top: int) -> int:
    # argmax finds NaN before anything else.
    if not np.isfinite(logits[top]):
        raise PhiError(f"the logits hold {logits[top]}: the model's weights are damaged, or every token is banned")
    return top


def logprob(logits: Floats, token: int, n_top: int) -> TokenLogprob:
    """Return a token's log-probability and those of the n_top likeliest tokens; logits float32 [n_vocab]."""
    largest = float(logits.max())
    normaliser = largest + math.log(np.exp(logits - np.float32(largest)).sum(dtype=np.float64))
    top = _largest(logits, n_top) if n_top else ()
    return TokenLogprob(
        token=token,
        logprob=float(logits[token]) - normaliser,
        top=tuple((int(i), float(logits[i]) - normaliser) for i in top),
    )
