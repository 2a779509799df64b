"""Scoring of given text: log-probabilities, embeddings, logits. Logits are computed for a few positions at a time."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from phi_c._core import CancelFlag
from phi_c.arguments import check_token_ids
from phi_c.engine.loop import EngineLoop
from phi_c.engine.prompt_outputs import logits_by_chunk, stream_hidden_states
from phi_c.engine.sequence import Sequence as EngineSequence
from phi_c.errors import OptionError, PhiError
from phi_c.model.config import ModelConfig
from phi_c.params import check_fits
from phi_c.results import Score
from phi_c.text.request import encode_raw
from phi_c.text.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Pair: TypeAlias = tuple[list[int], list[int]]  # ids of a context (not empty) and of its continuation

POOLINGS = ("mean", "last")


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that stand for an empty prompt: the BOS token, else the end token.

    Raises OptionError for a vocabulary with neither.
    """
    ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    if not ids:
        raise OptionError("the prompt is empty, and the vocabulary has neither a BOS nor an end token to use instead")
    return ids[:1]


def encode_pair(tokenizer: Tokenizer, prompt: str, continuation: str, *, parse_special: bool = False) -> Pair:
    """Return the ids of a prompt and its continuation, split as lm-evaluation-harness does.

    White space at the end of the prompt moves to the continuation. Both are encoded together; the tokens after as many
    as the prompt alone has are the continuation. An empty prompt becomes `prefix_ids`.
    """
    stripped = prompt.rstrip()
    if not stripped:
        ids = tokenizer.encode(prompt + continuation, add_bos=False, parse_special=parse_special)
        prefix = prefix_ids(tokenizer)
        return (prefix, ids) if ids[:1] != prefix else (prefix, ids[1:])
    context = tokenizer.encode(stripped, parse_special=parse_special)
    whole = tokenizer.encode(prompt + continuation, parse_special=parse_special)
    return context, whole[len(context) :]


def encode_pairs(
    tokenizer: Tokenizer,
    config: ModelConfig,
    n_ctx: int,
    prompt: str | Sequence[int],
    continuations: Sequence[str | Sequence[int]],
    *,
    parse_special: bool,
) -> list[Pair]:
    """Return the pair of a prompt and each continuation, either of which is text or token ids.

    Raises OptionError for a continuation without tokens, ContextLengthError for a pair longer than n_ctx.
    """
    if isinstance(continuations, str):
        raise OptionError("continuations is a str, expected a list of strings or of token id lists")
    pairs = []
    for i, continuation in enumerate(continuations):
        context, ids = _encode_either(tokenizer, config.n_vocab, prompt, continuation, parse_special)
        if not ids:
            raise OptionError(f"continuation {i} adds no token to the prompt: {continuation!r:.60}")
        check_fits(len(context) + len(ids) - 1, n_ctx, config, f"the prompt with continuation {i}")
        pairs.append((context, ids))
    return pairs


def _encode_either(
    tokenizer: Tokenizer,
    n_vocab: int,
    prompt: str | Sequence[int],
    continuation: str | Sequence[int],
    parse_special: bool,
) -> Pair:
    if isinstance(prompt, str) and isinstance(continuation, str):
        return encode_pair(tokenizer, prompt, continuation, parse_special=parse_special)
    if len(prompt):
        context = encode_raw(prompt, tokenizer, n_vocab, parse_special=parse_special)
    else:
        context = prefix_ids(tokenizer)
    if isinstance(continuation, str):
        return context, tokenizer.encode(continuation, add_bos=False, parse_special=parse_special)
    return context, check_token_ids(continuation, n_vocab) if len(continuation) else []


def score_pairs(
    loop: EngineLoop, pairs: Iterable[Pair], cancel: CancelFlag | None = None
) -> Iterator[tuple[int, Score]]:
    """Yield (index of the pair, score) in the order in which pairs complete.

    Consecutive pairs with the same context compute it once. Those that differ in their last token only, such as the
    letters of a multiple choice, are one sequence. A pair takes len(context) + len(continuation) - 1 positions, which
    must fit the context. Raises Cancelled, ModelClosedError, PhiError for logits that are not finite.
    """
    pending: dict[EngineSequence, list[_PendingScore]] = {}
    flag = CancelFlag(cancel)

    def groups() -> Iterator[list[EngineSequence]]:
        for _, group in itertools.groupby(enumerate(pairs), key=lambda numbered: numbered[1][0]):
            sequences: dict[tuple[int, ...], EngineSequence] = {}
            for index, (context, continuation) in group:
                inputs = tuple(continuation[:-1])  # the logits after the last token are not needed
                if inputs not in sequences:
                    sequence = EngineSequence([*context, *inputs], output_from=len(context) - 1, cancel=flag)
                    sequences[inputs] = sequence
                    pending[sequence] = []
                pending[sequences[inputs]].append(_PendingScore(index, continuation))
            yield list(sequences.values())

    for sequence, position, states in stream_hidden_states(loop, groups()):
        for chunk, logits in logits_by_chunk(loop, states, flag):
            for score in pending[sequence]:
                score.add(position - (sequence.output_from or 0) + chunk.start, logits)
        if position + len(states) == sequence.n_prompt:
            for score in pending.pop(sequence):
                yield score.index, score.finish(sequence.n_cached or 0)


class _PendingScore:
    """The score of one pair while its logits arrive in chunks."""

    def __init__(self, index: int, continuation: list[int]) -> None:
        self.index = index
        self._ids = np.asarray(continuation)
        self._logprobs = np.empty(len(continuation))
        self._is_top = np.empty(len(continuation), np.bool_)

    def add(self, start: int, logits: Floats) -> None:
        """Add logits [n, n_vocab] that predict the continuation's tokens start .. start + n - 1."""
        part = slice(start, start + len(logits))
        self._logprobs[part], self._is_top[part] = token_logprobs(logits, self._ids[part])

    def finish(self, n_cached: int) -> Score:
        return Score(
            logprob=float(self._logprobs.sum()),
            tokens=self._ids.tolist(),
            logprobs=self._logprobs.tolist(),
            is_greedy=bool(self._is_top.all()),
            cached_tokens=n_cached,
        )


def token_logprobs(logits: Floats, ids: npt.NDArray[Any]) -> tuple[Doubles, npt.NDArray[np.bool_]]:
    """Return each token's log-probability in nats, [n], and whether it is the most probable token, [n].

    logits: float32 [n, n_vocab]. ids: [n]. Raises PhiError for logits that are not finite.
    """
    rows = np.arange(len(logits))
    top = logits.argmax(1)  # a NaN, if there is one
    row_max = logits[rows, top]
    if not np.isfinite(row_max).all():
        raise PhiError(f"the logits hold {row_max[~np.isfinite(row_max)][0]}: the model's weights are corrupt")
    sums = np.array([np.exp(row - peak).sum(dtype=np.float64) for row, peak in zip(logits, row_max, strict=True)])
    return logits[rows, ids] - (row_max + np.log(sums)), top == ids


def embed_inputs(
    loop: EngineLoop,
    inputs: Sequence[list[int]],
    n_embd: int,
    *,
    pooling: str,
    normalize: bool,
    cancel: CancelFlag | None,
) -> Floats:
    """Return the pooled hidden states after the final norm of each input's token ids: float32 [n_inputs, n_embd].

    Raises OptionError for an unknown pooling, Cancelled, ModelClosedError.
    """
    if pooling not in POOLINGS:
        raise OptionError(f"pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
    firsts = [0 if pooling == "mean" else len(ids) - 1 for ids in inputs]
    sequences = {
        EngineSequence(ids, output_from=first, cancel=CancelFlag(cancel)): i
        for i, (ids, first) in enumerate(zip(inputs, firsts, strict=True))
    }
    sums = np.zeros((len(inputs), n_embd))
    for sequence, _, states in stream_hidden_states(loop, ([sequence] for sequence in sequences)):
        sums[sequences[sequence]] += states.sum(0, dtype=np.float64)
    counts = [len(ids) - first for ids, first in zip(inputs, firsts, strict=True)]
    embeddings = sums / np.asarray(counts, np.float64).reshape(-1, 1)
    if normalize:
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return embeddings.astype(np.float32)


def all_logits(loop: EngineLoop, ids: list[int], n_vocab: int) -> Floats:
    """Return the logits after each token: float32 [n_tokens, n_vocab]. Raises ModelClosedError."""
    out = np.empty((len(ids), n_vocab), np.float32)
    for sequence, position, states in stream_hidden_states(loop, [[EngineSequence(ids, output_from=0)]]):
        for chunk, logits in logits_by_chunk(loop, states, sequence.cancel):
            out[position + chunk.start : position + chunk.stop] = logits
    return out
