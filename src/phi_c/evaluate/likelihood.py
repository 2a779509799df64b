"""Perplexity of a text."""

from collections.abc import Callable
from dataclasses import dataclass

from phi_c._core import CancelFlag
from phi_c.evaluate.metrics import perplexity_of, standard_error
from phi_c.llm import LLM
from phi_c.params import check_count
from phi_c.scoring import score_pairs
from phi_c.text.windows import disjoint, strided

DEFAULT_N_CTX = 512  # window size in tokens, as in llama.cpp


@dataclass(frozen=True)
class Perplexity:
    """Perplexity: exp of the mean negative log-likelihood (NLL) of the scored tokens."""

    perplexity: float
    standard_error: float  # of the perplexity: perplexity * nll_standard_error; NaN for a single window
    nll: float  # mean, nats per token
    nll_standard_error: float  # over windows, see phi_c.evaluate.metrics.standard_error
    n_tokens: int  # scored tokens
    n_windows: int


def perplexity(
    llm: LLM,
    text: str,
    *,
    n_ctx: int = DEFAULT_N_CTX,
    stride: int | None = None,
    n_windows: int | None = None,
    progress: Callable[[int, int, Perplexity], None] | None = None,
    cancel: CancelFlag | None = None,
) -> Perplexity:
    """Compute the perplexity of a text in windows.

    n_ctx: window size in tokens.
    stride: None: windows are disjoint, each begins with BOS if the model uses it, the second half of each is scored,
        and an incomplete last window is omitted, as in llama.cpp. Otherwise windows begin every `stride` tokens, and
        each token is scored once, in the first window that contains it, as in the transformers perplexity guide.
    n_windows: maximum number of windows; None: all.
    progress: called with the number of finished windows, the number of all windows, and the perplexity so far.
    cancel: a flag that stops the call from another thread.

    Raises OptionError for a text that is too short or an option outside its range, Cancelled.
    """
    check_count("n_ctx", n_ctx, 2, llm.n_ctx)
    check_count("stride", stride, 1, n_ctx)
    check_count("n_windows", n_windows, 1, None)
    ids = llm.tokenizer.encode(text)
    if stride is None:
        windows = disjoint(llm.tokenizer, ids, n_ctx, n_windows)
    else:
        windows = strided(ids, n_ctx, stride, n_windows)
    sums: list[float] = []
    counts: list[int] = []
    pairs = ((w.tokens[: w.n_context], w.tokens[w.n_context :]) for w in windows)
    for index, score in score_pairs(llm.loop, pairs, cancel):
        sums.append(-score.logprob)
        counts.append(windows[index].n_scored)
        if progress is not None:
            progress(len(sums), len(windows), _estimate(sums, counts))
    return _estimate(sums, counts)


def _estimate(sums: list[float], counts: list[int]) -> Perplexity:
    """Return the perplexity from the NLL sum and the number of scored tokens of each window."""
    nll, error = sum(sums) / sum(counts), standard_error(sums, counts)
    value = perplexity_of(nll)
    return Perplexity(value, value * error, nll, error, sum(counts), len(sums))
