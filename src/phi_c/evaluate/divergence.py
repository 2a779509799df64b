"""How far two models are from each other on a text, position by position."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_c._core import CancelFlag
from phi_c.engine.prompt_outputs import logits_by_chunk, read_all
from phi_c.engine.sequence import Sequence
from phi_c.errors import OptionError, PhiError
from phi_c.evaluate.likelihood import DEFAULT_N_CTX
from phi_c.evaluate.metrics import distances, perplexity_of, standard_error
from phi_c.llm import LLM
from phi_c.params import check_count
from phi_c.text.windows import disjoint

_N_BUCKETS = 8


@dataclass(frozen=True)
class Bucket:
    """Positions first to last of all windows."""

    first: int
    last: int
    kl: float  # mean
    top1_agreement: float  # share


@dataclass(frozen=True)
class Comparison:
    """KL is KL(A || B) in nats a token; errors are phi_c.evaluate.metrics.standard_error over windows."""

    kl: float  # mean
    kl_standard_error: float
    kl_median: float
    kl_99: float  # what 99 % of the tokens stay below
    kl_max: float
    top1_agreement: float  # how often the likeliest token is the same
    top1_agreement_standard_error: float
    perplexity_a: float  # of every token after a window's first
    perplexity_b: float
    perplexity_ratio: float  # B's over A's
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
    """Return how far B's predictions are from A's on windows of n_ctx tokens, after every token of them.

    Windows follow one another, each begins with BOS if the models want one. n_windows: at most. progress: is told
    windows done, all windows, and the mean KL so far. Of the logits a few rows are in memory at a time.

    Raises OptionError when the models' vocabularies differ, for a text that fills no window and for options outside
    their range, PhiError for logits that are not finite, Cancelled.
    """
    for model in (a, b):
        check_count("n_ctx", n_ctx, 2, model.n_ctx)
    check_count("n_windows", n_windows, 1, None)
    ids = _same_ids(a, b, text)
    windows = disjoint(a.tokenizer, ids, n_ctx, n_windows)
    found: dict[str, list[npt.NDArray[np.float64]]] = {"kl": [], "top1_agreement": [], "nll": [], "reference_nll": []}
    for window in windows:
        for name, values in _compare_window(a, b, window.tokens, cancel).items():
            found[name].append(values)
        if progress is not None:
            progress(len(found["kl"]), len(windows), float(np.mean(found["kl"])))
    return _summary({name: np.stack(values) for name, values in found.items()})


def _same_ids(a: LLM, b: LLM, text: str) -> list[int]:
    if a.config.n_vocab != b.config.n_vocab:
        raise OptionError(
            f"{a.path.name} has {a.config.n_vocab} logits a token, {b.path.name} {b.config.n_vocab}: "
            "only models of one vocabulary can be compared"
        )
    for i, (x, y) in enumerate(zip(a.tokenizer.vocabulary.tokens, b.tokenizer.vocabulary.tokens, strict=False)):
        if x != y:
            raise OptionError(f"token {i} is {x!r} in {a.path.name}, {y!r} in {b.path.name}: expected one vocabulary")
    ids = a.tokenizer.encode(text)
    if b.tokenizer.encode(text) != ids:
        raise OptionError(f"{a.path.name} and {b.path.name} cut this text into different tokens")
    return ids


def _compare_window(a: LLM, b: LLM, tokens: list[int], cancel: CancelFlag | None) -> dict[str, npt.NDArray[np.float64]]:
    following = np.asarray(tokens[1:])
    sequences = [Sequence(list(tokens), output_from=0, cancel=cancel) for _ in (a, b)]
    rows = [read_all(llm.engine, sequence) for llm, sequence in zip((a, b), sequences, strict=True)]
    chunks = (logits_by_chunk(llm.engine, s, r) for llm, s, r in zip((a, b), sequences, rows, strict=True))
    with np.errstate(invalid="ignore"):  # seen below
        parts = [distances(p, q, following[chunk]) for (chunk, p), (_, q) in zip(*chunks, strict=True)]
    if not all(np.isfinite(part["kl"]).all() for part in parts):
        raise PhiError(f"the logits of {a.path.name} or {b.path.name} are not finite: the model's weights are damaged")
    return {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]}


def _summary(found: dict[str, npt.NDArray[np.float64]]) -> Comparison:
    """Return the figures of values [n_windows, n_tokens]."""
    kl, top1_agreement = found["kl"], found["top1_agreement"]
    ratio = perplexity_of(float((found["nll"] - found["reference_nll"]).mean()))
    n_windows, n_tokens = kl.shape
    parts = np.array_split(np.arange(n_tokens), min(_N_BUCKETS, n_tokens))
    return Comparison(
        kl=float(kl.mean()),
        kl_standard_error=_error(kl),
        kl_median=float(np.median(kl)),
        kl_99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(top1_agreement.mean()),
        top1_agreement_standard_error=_error(top1_agreement),
        perplexity_a=perplexity_of(float(found["reference_nll"].mean())),
        perplexity_b=perplexity_of(float(found["nll"].mean())),
        perplexity_ratio=ratio,
        perplexity_ratio_standard_error=ratio * _error(found["nll"] - found["reference_nll"]),
        by_position=tuple(
            Bucket(int(part[0]), int(part[-1]), float(kl[:, part].mean()), float(top1_agreement[:, part].mean()))
            for part in parts
        ),
        n_tokens=kl.size,
        n_windows=n_windows,
    )


def _error(values: npt.NDArray[np.float64]) -> float:
    return standard_error(values.sum(1), np.full(len(values), values.shape[1]))
