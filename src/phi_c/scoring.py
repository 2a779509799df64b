"""What a model makes of given texts: log-likelihoods, embeddings, logits. Heads run in chunks of a few rows."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from phi_c._core import CancelFlag
from phi_c.engine.engine import Engine
from phi_c.engine.prompt_outputs import logits_by_chunk, read
from phi_c.engine.sequence import Sequence as EngineSequence
from phi_c.errors import OptionError, PhiError
from phi_c.results import Score
from phi_c.text.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Pair: TypeAlias = tuple[list[int], list[int]]  # ids of a context, not empty, and of what follows it

POOLINGS = ("mean", "last")


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Return what an empty prompt stands for: the BOS token, else the end token."""
    ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    if not ids:
        raise OptionError("the prompt is empty, and the vocabulary has neither a BOS nor an end token to begin with")
    return ids[:1]


def encode_pair(tokenizer: Tokenizer, prompt: str, continuation: str, *, parse_special: bool = False) -> Pair:
    """Return the ids of a prompt and of its continuation as lm-evaluation-harness cuts them.

    White space that ends the prompt goes over to the continuation; both are encoded together, and what lies beyond as
    many tokens as the prompt alone has is the continuation. After an empty prompt comes the continuation alone.
    """
    kept = prompt.rstrip()
    if not kept:
        ids = tokenizer.encode(prompt + continuation, add_bos=False, parse_special=parse_special)
        prefix = prefix_ids(tokenizer)
        return (prefix, ids) if ids[:1] != prefix else (prefix, ids[1:])
    context = tokenizer.encode(kept, parse_special=parse_special)
    whole = tokenizer.encode(prompt + continuation, parse_special=parse_special)
    return context, whole[len(context) :]


def score_pairs(engine: Engine, pairs: Iterable[Pair], cancel: CancelFlag | None = None) -> Iterator[tuple[int, Score]]:
    """Yield (number of the pair, score) as they are done; pairs in a row that have the same context share it.

    Those that differ in their last token only, as the letters of a multiple choice, are one sequence. Of a pair
    len(context) + len(continuation) - 1 positions are computed, which must fit the context.
    """
    scored: dict[EngineSequence, list[_Scored]] = {}

    def groups() -> Iterator[list[EngineSequence]]:
        for _, group in itertools.groupby(enumerate(pairs), key=lambda numbered: numbered[1][0]):
            sequences: dict[tuple[int, ...], EngineSequence] = {}
            for index, (context, continuation) in group:
                known = tuple(continuation[:-1])  # the last token predicts nothing that is wanted
                if known not in sequences:
                    sequence = EngineSequence([*context, *known], output_from=len(context) - 1, cancel=cancel)
                    sequences[known] = sequence
                    scored[sequence] = []
                scored[sequences[known]].append(_Scored(index, continuation))
            yield list(sequences.values())

    for sequence, first, rows in read(engine, groups()):
        for chunk, logits in logits_by_chunk(engine, sequence, rows):
            for part in scored[sequence]:
                part.add(first - sequence.output_start + chunk.start, logits)
        if first + len(rows) == len(sequence.tokens):
            for part in scored.pop(sequence):
                yield part.index, part.score(sequence.n_cached)


class _Scored:
    """A pair on its way."""

    def __init__(self, index: int, continuation: list[int]) -> None:
        self.index = index
        self._ids = np.asarray(continuation)
        self._logprobs = np.empty(len(continuation))
        self._is_top = np.empty(len(continuation), np.bool_)

    def add(self, first: int, logits: Floats) -> None:
        part = slice(first, first + len(logits))
        self._logprobs[part], self._is_top[part] = token_logprobs(logits, self._ids[part])

    def score(self, n_cached: int) -> Score:
        return Score(
            logprob=float(self._logprobs.sum()),
            tokens=self._ids.tolist(),
            logprobs=self._logprobs.tolist(),
            is_greedy=bool(self._is_top.all()),
            cached_tokens=n_cached,
        )


def token_logprobs(logits: Floats, ids: npt.NDArray[Any]) -> tuple[Doubles, npt.NDArray[np.bool_]]:
    """Return the log-probability (nats) of one token a row, and whether it is the row's likeliest.

    logits float32 [n, n_vocab], ids [n]. Raises PhiError for logits that are not finite.
    """
    rows = np.arange(len(logits))
    top = logits.argmax(1)  # of NaN, if there is one
    largest = logits[rows, top]
    if not np.isfinite(largest).all():
        raise PhiError(f"the logits hold {largest[~np.isfinite(largest)][0]}: the model's weights are damaged")
    sums = np.array([np.exp(row - most).sum(dtype=np.float64) for row, most in zip(logits, largest, strict=True)])
    return logits[rows, ids] - (largest + np.log(sums)), top == ids


def embed_texts(
    engine: Engine, texts: Sequence[list[int]], n_embd: int, *, pooling: str, normalize: bool, cancel: CancelFlag | None
) -> Floats:
    """Return float32 [n_texts, n_embd]: the mean of each text's rows after the final norm, or the last one."""
    if pooling not in POOLINGS:
        raise OptionError(f"pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
    sequences = {
        EngineSequence(list(ids), output_from=0 if pooling == "mean" else len(ids) - 1, cancel=cancel): i
        for i, ids in enumerate(texts)
    }
    sums = np.zeros((len(texts), n_embd))
    for sequence, _, rows in read(engine, ([sequence] for sequence in sequences)):
        sums[sequences[sequence]] += rows.sum(0, dtype=np.float64)
    counts = [len(sequence.tokens) - sequence.output_start for sequence in sequences]
    means = sums / np.asarray(counts, np.float64).reshape(-1, 1)
    if normalize:
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return means.astype(np.float32)


def all_logits(engine: Engine, ids: list[int], n_vocab: int) -> Floats:
    """Return the logits after each token: float32 [n_tokens, n_vocab]."""
    out = np.empty((len(ids), n_vocab), np.float32)
    for sequence, first, rows in read(engine, [[EngineSequence(ids, output_from=0)]]):
        for chunk, logits in logits_by_chunk(engine, sequence, rows):
            out[first + chunk.start : first + chunk.stop] = logits
    return out
