"""Generation calls: options are checked, and an engine sequence becomes a stream of chunks."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phi_c._core import PAGE_TOKENS, CancelFlag
from phi_c.engine.engine import Engine
from phi_c.engine.prefix_cache import DiskPrefixCache
from phi_c.engine.sequence import Finish
from phi_c.engine.sequence import Sequence as EngineSequence
from phi_c.errors import OptionError
from phi_c.params import check_count
from phi_c.results import Chunk, Usage, make_chunk
from phi_c.sampling.params import SamplingParams
from phi_c.sampling.sampler import Sampler
from phi_c.text.request import Prompt
from phi_c.text.stream_decoder import StreamDecoder
from phi_c.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationOptions:
    """The checked options of one generation call."""

    max_tokens: int | None  # None: up to the end of the context
    stop: tuple[str, ...]
    logprobs: int | None  # number of most probable tokens to report; None: no log-probabilities
    cancel: CancelFlag | None
    sampling: SamplingParams


def check_options(
    max_tokens: int | None,
    stop: str | Sequence[str],
    logprobs: int | None,
    cancel: CancelFlag | None,
    sampling: dict[str, Any],
) -> GenerationOptions:
    """Return the options as a dataclass. Raises OptionError, and TypeError for an unknown sampling option."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise OptionError(f"stop is {stop!r:.60}, expected non-empty strings")
    check_count("max_tokens", max_tokens, 1, None)
    check_count("logprobs", logprobs, 0, None)
    return GenerationOptions(max_tokens, stops, logprobs, cancel, SamplingParams(**sampling))


def stream_chunks(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: GenerationOptions,
    *,
    n_ctx: int,
    n_vocab: int,
    prefix_cache: DiskPrefixCache | None,
) -> Iterator[Chunk]:
    """Return an iterator over a call's output; its first `next` queues the sequence.

    The prompt must fit n_ctx. n_vocab: rows of the model's output matrix. prefix_cache: stores the prompt's pages after
    the last chunk was consumed. Raises OptionError at once for a logit bias outside the vocabulary.
    """
    # The last generated token is never computed, so one token more than the context can be generated.
    n_remaining = n_ctx - len(prompt.ids) + 1
    sequence = EngineSequence(
        tokens=prompt.ids,
        max_tokens=n_remaining if options.max_tokens is None else min(options.max_tokens, n_remaining),
        sampler=Sampler(options.sampling, n_vocab),
        eog_ids=tokenizer.eog_ids,
        n_top_logprobs=options.logprobs,
        cancel=options.cancel,
    )
    decoder = StreamDecoder(tokenizer, options.stop, continues=prompt.is_raw)
    return _run(engine, sequence, decoder, tokenizer.n_vocab, prefix_cache)


def _run(
    engine: Engine,
    sequence: EngineSequence,
    decoder: StreamDecoder,
    n_tokenizer_vocab: int,
    prefix_cache: DiskPrefixCache | None,
) -> Iterator[Chunk]:
    """Step the engine until the sequence is done; yield its text as it is decoded."""
    # One entry per generated token that is not yielded yet. A thread that drives another sequence appends as well.
    texts: deque[str] = deque()

    def accept(token: int) -> bool:
        texts.append(decoder.push(token) if token < n_tokenizer_vocab else "")
        return not decoder.stopped

    sequence.accept = accept
    start = time.perf_counter()
    first_token: float | None = None
    n_yielded = 0
    engine.add(sequence)
    try:
        while not sequence.is_done:
            engine.step(sequence)
            if first_token is None and len(sequence.tokens) > sequence.n_prompt:
                first_token = time.perf_counter()
            if texts and not sequence.is_done:
                drained = drain(texts)
                yield make_chunk(sequence, n_yielded, n_yielded + len(drained), "".join(drained))
                n_yielded += len(drained)
    finally:
        engine.remove(sequence)
    if sequence.error is not None:  # raised in a step that another thread drove
        raise sequence.error
    end = time.perf_counter()
    n_generated = len(sequence.tokens) - sequence.n_prompt
    usage = Usage(
        prompt_tokens=sequence.n_prompt,
        cached_tokens=sequence.n_cached,
        completion_tokens=n_generated,
        prompt_seconds=(first_token or end) - start,
        decode_seconds=end - (first_token or end),
    )
    finish = sequence.finish or Finish.CANCELLED
    yield make_chunk(sequence, n_yielded, n_generated, "".join(drain(texts)) + decoder.finish(), finish, usage)
    if prefix_cache is not None:
        prefix_cache.store(engine, sequence.keys[: sequence.n_prompt // PAGE_TOKENS])


def drain(queue: deque[str]) -> list[str]:
    """Remove and return all items of a queue to which other threads may append at the same time."""
    items: list[str] = []
    while queue:
        items.append(queue.popleft())
    return items
