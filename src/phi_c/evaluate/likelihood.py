"""Perplexity: how likely a model finds a text."""

from collections.abc import Callable
from dataclasses import dataclass

from phi_c._core import CancelFlag
from phi_c.evaluate.metrics import perplexity_of, standard_error
from phi_c.llm import LLM
from phi_c.params import check_count
from phi_c.scoring import score_pairs
from phi_c.text.windows import disjoint, strided

DEFAULT_N_CTX = 512  # of a window, as llama.cpp


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the tokens that count."""

    perplexity: float
    standard_error: float  # of the perplexity: itself times that of nll; NaN for a single window
    nll: float  # mean, nats a token
    nll_standard_error: float  # windows counted as independent: phi_c.evaluate.metrics.standard_error
    n_tokens: int  # that count
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
    """Return a text's perplexity, in windows of n_ctx tokens.

    stride None: windows follow one another, each begins with BOS if the model wants one, and the second half of each
    counts, as in llama.cpp; a rest that fills no window is left out. stride: windows begin every so many tokens, and
    each token counts once, in the first window that holds it, as in transformers' guide. n_windows: at most.
    progress: is told windows done, all windows, and the figure so far.

    Raises OptionError for a text that is too short and for options outside their range, Cancelled.
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
    for index, score in score_pairs(llm.engine, pairs, cancel):
        sums.append(-score.logprob)
        counts.append(windows[index].n_scored)
        if progress is not None:
            progress(len(sums), len(windows), _estimate(sums, counts))
    return _estimate(sums, counts)


def _estimate(sums: list[float], counts: list[int]) -> Perplexity:
    nll, error = sum(sums) / sum(counts), standard_error(sums, counts)
    value = perplexity_of(nll)
    return Perplexity(value, value * error, nll, error, sum(counts), len(sums))
