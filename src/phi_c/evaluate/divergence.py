"""Comparison of two models' predictions: KL divergence, top-1 agreement, perplexity ratio."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_c._core import CancelFlag
from phi_c.engine.prompt_outputs import hidden_states, logits_by_chunk
from phi_c.engine.sequence import Sequence
from phi_c.errors import OptionError, PhiError
from phi_c.evaluate.likelihood import DEFAULT_N_CTX
from phi_c.evaluate.metrics import perplexity_of, standard_error, token_metrics
from phi_c.llm import LLM
from phi_c.params import check_count
from phi_c.text.windows import disjoint

_N_BUCKETS = 8


@dataclass(frozen=True)
class Bucket:
    """Results for a range of positions within the windows."""

    first: int  # first position
    last: int  # last position, inclusive
    kl: float  # mean KL divergence, nats per token
    top1_agreement: float  # fraction, 0 to 1


@dataclass(frozen=True)
class Comparison:
    """Results of `compare`. KL is KL(A || B) in nats per token; standard errors are over windows, see metrics."""

    kl: float  # mean
    kl_standard_error: float
    kl_median: float
    kl_99: float  # 99th percentile
    kl_max: float
    top1_agreement: float  # fraction of tokens after which both models have the same most probable token
    top1_agreement_standard_error: float
    perplexity_a: float  # of all tokens but the first of each window
    perplexity_b: float
    perplexity_ratio: float  # perplexity_b / perplexity_a
    perplexity_ratio_standard_error: float
    by_position: tuple[Bucket, ...]
    n_tokens: int
    n_windows: int


def compare(
    a: LLM,
    b: LLM,
    text: str,
    *,
    n_ctx: int = DEFAULT_N_CTX,
    n_windows: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    cancel: CancelFlag | None = None,
) -> Comparison:
    """Compare the predictions of model B with those of model A after every token of a text.

    n_ctx: window size in tokens; windows are disjoint, and each begins with BOS if the models use it.
    n_windows: maximum number of windows; None: all that the text fills.
    progress: called with the number of finished windows, the number of all windows, and the mean KL so far.
    cancel: a flag that stops the call from another thread.

    Logits are computed for a few positions at a time. Raises OptionError if the vocabularies differ, the text does not
    fill a window or an option is outside its range; PhiError for logits that are not finite; Cancelled.
    """
    for model in (a, b):
        check_count("n_ctx", n_ctx, 2, model.n_ctx)
    check_count("n_windows", n_windows, 1, None)
    ids = _common_ids(a, b, text)
    windows = disjoint(a.tokenizer, ids, n_ctx, n_windows)
    metrics: dict[str, list[npt.NDArray[np.float64]]] = {"kl": [], "top1_agreement": [], "nll": [], "reference_nll": []}
    for window in windows:
        for name, values in _compare_window(a, b, window.tokens, cancel).items():
            metrics[name].append(values)
        if progress is not None:
            progress(len(metrics["kl"]), len(windows), float(np.mean(metrics["kl"])))
    return _summary({name: np.stack(values) for name, values in metrics.items()})


def _common_ids(a: LLM, b: LLM, text: str) -> list[int]:
    """Return the token ids of a text. Raises OptionError if the models' vocabularies or tokenizers differ."""
    if a.config.n_vocab != b.config.n_vocab:
        raise OptionError(
            f"{a.path.name} has {a.config.n_vocab} logits per token and {b.path.name} {b.config.n_vocab}: "
            "only models with the same vocabulary can be compared"
        )
    for i, (x, y) in enumerate(zip(a.tokenizer.vocabulary.tokens, b.tokenizer.vocabulary.tokens, strict=False)):
        if x != y:
            raise OptionError(
                f"token {i} is {x!r} in {a.path.name} and {y!r} in {b.path.name}: "
                "only models with the same vocabulary can be compared"
            )
    ids = a.tokenizer.encode(text)
    if b.tokenizer.encode(text) != ids:
        raise OptionError(
            f"{a.path.name} and {b.path.name} tokenise the text differently: "
            "only models with the same tokenizer can be compared"
        )
    return ids


def _compare_window(a: LLM, b: LLM, tokens: list[int], cancel: CancelFlag | None) -> dict[str, npt.NDArray[np.float64]]:
    """Return metrics.token_metrics of a window, float64 [n_tokens], or [n_tokens - 1] for those of the next token."""
    next_tokens = np.asarray(tokens[1:])
    flag = CancelFlag(cancel)
    states = [hidden_states(llm.loop, Sequence(tokens, output_from=0, cancel=flag)) for llm in (a, b)]
    chunks = (logits_by_chunk(llm.loop, rows, flag) for llm, rows in zip((a, b), states, strict=True))
    with np.errstate(invalid="ignore"):  # checked below
        parts = [token_metrics(p, q, next_tokens[chunk]) for (chunk, p), (_, q) in zip(*chunks, strict=True)]
    if not all(np.isfinite(part["kl"]).all() for part in parts):
        raise PhiError(f"the logits of {a.path.name} or {b.path.name} are not finite: the model's weights are corrupt")
    return {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]}


def _summary(metrics: dict[str, npt.NDArray[np.float64]]) -> Comparison:
    """Return the comparison from metrics by token, [n_windows, n_tokens]."""
    kl, top1_agreement = metrics["kl"], metrics["top1_agreement"]
    nll_change = metrics["nll"] - metrics["reference_nll"]
    ratio = perplexity_of(float(nll_change.mean()))
    n_windows, n_tokens = kl.shape
    parts = np.array_split(np.arange(n_tokens), min(_N_BUCKETS, n_tokens))
    return Comparison(
        kl=float(kl.mean()),
        kl_standard_error=_standard_error(kl),
        kl_median=float(np.median(kl)),
        kl_99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(top1_agreement.mean()),
        top1_agreement_standard_error=_standard_error(top1_agreement),
        perplexity_a=perplexity_of(float(metrics["reference_nll"].mean())),
        perplexity_b=perplexity_of(float(metrics["nll"].mean())),
        perplexity_ratio=ratio,
        perplexity_ratio_standard_error=ratio * _standard_error(nll_change),
        by_position=tuple(
            Bucket(int(part[0]), int(part[-1]), float(kl[:, part].mean()), float(top1_agreement[:, part].mean()))
            for part in parts
        ),
        n_tokens=kl.size,
        n_windows=n_windows,
    )


def _standard_error(values: npt.NDArray[np.float64]) -> float:
    return standard_error(values.sum(1), np.full(len(values), values.shape[1]))
