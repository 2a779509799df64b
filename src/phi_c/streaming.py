"""Generation calls: options are checked, and an engine sequence becomes a stream of chunks in the caller's thread."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from phi_c._core import CancelFlag
from phi_c.engine.loop import EngineLoop
from phi_c.engine.outputs import MAX_UNREAD_TOKENS, Output, OutputQueue
from phi_c.engine.prefix_cache import DiskPrefixCache
from phi_c.engine.sequence import Finish
from phi_c.engine.sequence import Sequence as EngineSequence
from phi_c.errors import OptionError
from phi_c.params import check_count
from phi_c.results import Chunk, Usage
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
    stop: str | Sequence[str] | None,
    logprobs: int | None,
    cancel: CancelFlag | None,
    sampling: SamplingParams,
) -> GenerationOptions:
    """Return the options as a dataclass. Raises OptionError."""
    max_tokens = check_count("max_tokens", max_tokens, 1, None)
    logprobs = check_count("logprobs", logprobs, 0, None)
    if cancel is not None and not isinstance(cancel, CancelFlag):
        raise OptionError(f"cancel is {cancel!r:.60}, expected a phi_c.CancelFlag")
    if cancel is not None and cancel.parent is not None:
        raise OptionError("cancel is a CancelFlag with a parent, expected one without")
    return GenerationOptions(max_tokens, _check_stop(stop), logprobs, cancel, sampling)


def _check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    is_iterable = isinstance(stop, Iterable) and not isinstance(stop, bytes)
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if is_iterable else ()
    if not is_iterable or not all(isinstance(s, str) and s for s in stops):
        raise OptionError(f"stop is {stop!r:.60}, expected non-empty strings")
    return stops


def stream_chunks(
    loop: EngineLoop,
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: GenerationOptions,
    *,
    n_ctx: int,
    n_vocab: int,
    prefix_cache: DiskPrefixCache | None,
    is_whole: bool,
) -> Iterator[Chunk]:
    """Return an iterator over a call's output; its first `next` submits the sequence.

    The prompt must fit n_ctx. n_vocab: rows of the model's output matrix. prefix_cache: stores the prompt's pages
    before the last chunk. is_whole: the caller needs the text at its end only. Raises OptionError at once for a logit
    bias outside the vocabulary.
    """
    # The last generated token is never computed, so one token more than the context can be generated.
    n_remaining = n_ctx - len(prompt.ids) + 1
    sequence = EngineSequence(
        tokens=prompt.ids,
        max_tokens=n_remaining if options.max_tokens is None else min(options.max_tokens, n_remaining),
        sampler=Sampler(options.sampling, n_vocab),
        eog_ids=tokenizer.eog_ids,
        n_top_logprobs=options.logprobs,
        cancel=CancelFlag(options.cancel),
        # A stop string is found when the tokens are read.
        outputs=OutputQueue(None if is_whole and not options.stop else MAX_UNREAD_TOKENS),
    )
    text = _TextOfOutputs(StreamDecoder(tokenizer, options.stop, continues=prompt.is_raw), tokenizer.n_vocab)
    return _run(loop, sequence, text, prefix_cache)


def _run(
    loop: EngineLoop, sequence: EngineSequence, text: "_TextOfOutputs", prefix_cache: DiskPrefixCache | None
) -> Iterator[Chunk]:
    """Submit a sequence and yield its text as its tokens come."""
    has_logprobs = sequence.n_top_logprobs is not None
    start = time.perf_counter()
    first_token: float | None = None
    n_generated = 0
    try:
        loop.submit(sequence)
        while True:
            outputs, finish = text.add(sequence.outputs.read())
            tokens = [output for output in outputs if output.token is not None]
            if tokens and first_token is None:
                first_token = tokens[0].time
            n_generated += len(tokens)
            if finish is not None:
                break
            yield _make_chunk(tokens, text.take(), has_logprobs)
    finally:
        loop.cancel([sequence])  # it may still run: after a stop string, or if the caller leaves
    end = outputs[-1].time
    usage = Usage(
        prompt_tokens=sequence.n_prompt,
        cached_tokens=sequence.n_cached or 0,
        completion_tokens=n_generated,
        prompt_seconds=(first_token or end) - start,
        decode_seconds=end - (first_token or end),
    )
    if prefix_cache is not None and first_token is not None:
        if tokens:  # writing the file takes time
            yield _make_chunk(tokens, text.take(), has_logprobs)
            tokens = []
        prefix_cache.store(loop, sequence.tokens[: sequence.n_prompt])
    last = _make_chunk(tokens, text.take() + text.finish(), has_logprobs)
    seed = None if sequence.sampler is None else sequence.sampler.seed
    yield replace(last, finish_reason=finish.value, usage=usage, seed=seed)


class _TextOfOutputs:
    """The text of a sequence's outputs, which ends at a stop string."""

    def __init__(self, decoder: StreamDecoder, n_tokenizer_vocab: int) -> None:
        self._decoder = decoder
        self._n_tokenizer_vocab = n_tokenizer_vocab
        self._pending = ""

    def add(self, outputs: list[Output]) -> tuple[list[Output], Finish | None]:
        """Decode outputs; return those up to the end of the text, and why it ends there (None: it does not).

        Raises the error that ended the sequence.
        """
        for n, output in enumerate(outputs, 1):
            if output.error is not None:
                raise output.error
            if output.token is not None and output.token < self._n_tokenizer_vocab:
                self._pending += self._decoder.push(output.token)
            if self._decoder.stopped:
                return outputs[:n], Finish.STOP
            if output.finish is not None:
                return outputs[:n], output.finish
        return outputs, None

    def take(self) -> str:
        """Return the text that was not taken yet."""
        text, self._pending = self._pending, ""
        return text

    def finish(self) -> str:
        """Return the text that the decoder held back."""
        return self._decoder.finish()


def _make_chunk(outputs: list[Output], text: str, has_logprobs: bool) -> Chunk:
    return Chunk(
        text=text,
        tokens=[output.token for output in outputs if output.token is not None],
        logprobs=[output.logprob for output in outputs if output.logprob is not None] if has_logprobs else None,
    )
