"""Chooses the next token of one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_c.errors import OptionError, PhiError
from phi_c.sampling.params import SamplingParams

Floats = npt.NDArray[np.float32]

_FEW = 1024  # candidates that are tried before a whole vocabulary is sorted


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
        self._random = np.random.Generator(np.random.PCG64(params.seed))

    def sample(self, logits: Floats, generated: Sequence[int]) -> int:
        """Return the next token id; logits float32 [n_vocab], generated: the ids so far, without the prompt."""
        logits = self._adjusted(logits, generated)
        if self.params.temperature <= 0:
            return int(_checked(logits, int(logits.argmax())))
        kept, probabilities = self._filtered(logits)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(kept[min(int(drawn), len(kept) - 1)])

    def _adjusted(self, logits: Floats, generated: Sequence[int]) -> Floats:
        p = self.params
        start = 0 if p.repeat_last_n < 0 else len(generated) - p.repeat_last_n
        recent = generated[max(start, 0) :]
        has_penalty = p.repeat_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        if not p.logit_bias and not (has_penalty and recent):
            return logits
        logits = logits.copy()
        if has_penalty and recent:
            tokens, counts = np.unique(np.asarray(recent), return_counts=True)
            values = logits[tokens]
            values = np.where(values >= 0, values / p.repeat_penalty, values * p.repeat_penalty)
            logits[tokens] = values - p.presence_penalty - p.frequency_penalty * counts
        for token, bias in p.logit_bias.items():
            logits[token] += bias
        return logits

    def _filtered(self, logits: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the token ids that may be drawn, and their weights."""
        p = self.params
        top = _checked(logits, int(logits.argmax()))
        scaled = (logits - logits[top]) / np.float32(p.temperature)
        weights = np.exp(scaled, dtype=np.float32)
        kept = np.flatnonzero(weights >= p.min_p) if p.min_p > 0 else np.arange(len(weights))
        if p.top_k and len(kept) > p.top_k:
            kept = kept[np.argpartition(-weights[kept], p.top_k - 1)[: p.top_k]]
        if not 0 < p.top_p < 1:
            return kept, weights[kept].astype(np.float64)
        share = p.top_p * float(weights[kept].sum(dtype=np.float64))
        kept = _likeliest(kept, weights, share)
        ordered = weights[kept].astype(np.float64)
        crossing = int(np.searchsorted(np.cumsum(ordered), share))
        return kept[: crossing + 1], ordered[: crossing + 1]


def _likeliest(kept: npt.NDArray[np.int64], weights: Floats, share: float) -> npt.NDArray[np.int64]:
    """Sort candidates by weight, ties by id: all of them, or a few that hold the share together."""
    if len(kept) > _FEW:
        few = kept[np.argpartition(-weights[kept], _FEW)[:_FEW]]
        if float(weights[few].sum(dtype=np.float64)) > share:
            kept = few
    return kept[np.lexsort((kept, -weights[kept]))]


def _checked(logits: Floats, top: int) -> int:
    # argmax finds NaN before anything else.
    if not np.isfinite(logits[top]):
        raise PhiError(f"the logits hold {logits[top]}: the model's weights are damaged, or every token is banned")
    return top


def logprob(logits: Floats, token: int, n_top: int) -> TokenLogprob:
    """Return a token's log-probability and those of the n_top likeliest tokens; logits float32 [n_vocab]."""
    logits64 = logits.astype(np.float64)
    largest = logits64.max()
    normaliser = largest + np.log(np.exp(logits64 - largest).sum())
    top: npt.NDArray[np.int64] = np.empty(0, np.int64)
    if n_top:
        top = np.argpartition(-logits64, min(n_top, len(logits64) - 1))[:n_top].astype(np.int64)
        top = top[np.lexsort((top, -logits64[top]))]
    return TokenLogprob(
        token=token,
        logprob=float(logits64[token] - normaliser),
        top=tuple((int(i), float(logits64[i] - normaliser)) for i in top),
    )
