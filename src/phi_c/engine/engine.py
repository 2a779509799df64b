"""The engine: one step after another, schedule, forward, sample, commit. It belongs to one thread; see loop.py."""

import time
from collections.abc import Iterable
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from phi_c._core import CancelFlag, KvCache, Model, Timings, forward, lm_head
from phi_c.engine.kv_pages import PagePool
from phi_c.engine.outputs import Output, OutputQueue
from phi_c.engine.scheduler import Scheduler, Work, pages_for
from phi_c.engine.sequence import Finish, Sequence
from phi_c.errors import Cancelled, ContextLengthError, ModelClosedError
from phi_c.sampling.sampler import TokenLogprob, logprob

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Sample = tuple[int, TokenLogprob | None] | Exception

_MIN_PREFILL_TOKENS = 16  # in a step, beside decoding sequences
_RATE_WEIGHT = 0.25  # of the last step in the moving average of the time per token


class Engine:
    """Runs sequences on one model and one KV cache. Not thread-safe: EngineLoop owns it.

    kv_cache_tokens: KV cache capacity in tokens, shared by all sequences.
    n_batch: maximum number of tokens in a step.
    n_ctx_orig, window: see Scheduler.
    kv_type: see KvCache.
    max_step_seconds: how long prefill may make decoding sequences wait in a step, as far as the speed of earlier steps
        tells.

    timings: set it to collect the times of all forward passes.
    interrupt: set it, from any thread, to abort the running forward pass; what it computed is lost.
    """

    def __init__(
        self,
        model: Model,
        kv_cache_tokens: int,
        n_batch: int,
        n_ctx_orig: int | None = None,
        kv_type: str = "f16",
        window: int | None = None,
        max_step_seconds: float = 0.25,
    ) -> None:
        self.model = model
        self.kv = KvCache(model, pages_for(kv_cache_tokens), kv_type)
        self.scheduler = Scheduler(PagePool(self.kv.n_pages), n_batch, n_ctx_orig, window)
        self.max_step_seconds = max_step_seconds
        self.timings: Timings | None = None
        self.interrupt = CancelFlag()
        self._seconds_per_token: float | None = None  # of steps with prefill
        self._closed = False

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences; those that come together start in the same step if there is room."""
        if self._closed:
            self._publish([Output(s, error=ModelClosedError("the model was closed")) for s in sequences])
            return
        for sequence in sequences:
            try:
                self.scheduler.add(sequence)
            except ContextLengthError as error:
                self._publish([Output(sequence, error=error)])

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence without an output. No effect on one that is done."""
        self.scheduler.remove(sequence)

    def step(self) -> None:
        """Run one step for all sequences; publish what it produced when it is committed."""
        outputs = self._remove_cancelled()
        work = self.scheduler.schedule(self._max_prefill_tokens())
        try:
            rows = self._forward(work)
        except Cancelled:  # the next step removes the cancelled sequences, and repeats the work if there are others
            self._publish(outputs)
            return
        except Exception as error:  # no memory, no threads
            self._publish(outputs + [Output(w.sequence, error=error) for w in work])
            return
        samples = [self._sample(w, row) for w, row in zip(work, rows, strict=True)]
        outputs += self._commit(work, samples, rows)
        self._publish(outputs)

    def lm_head(self, hidden_states: Floats) -> Floats:
        """Return the logits, float32 [n, n_vocab], of hidden states after the final norm, float32 [n, n_embd]."""
        return lm_head(self.model, self.kv, hidden_states)

    def registered_keys(self) -> list[bytes]:
        """Return the keys of all registered pages, least recently used first."""
        return self.scheduler.pool.registered_keys()

    def read_page(self, key: bytes) -> Bytes | None:
        """Return a copy of a key's page, uint8 [page_bytes], or None if it is not registered."""
        page = self.scheduler.pool.find(key)
        return None if page is None else self.kv.read_page(page)

    def insert_page(self, key: bytes, data: Bytes) -> bool:
        """Register a page with data from `read_page` as the most recently used one.

        Returns False if running sequences need all free pages.
        """
        pool = self.scheduler.pool
        page = pool.find(key)
        if page is not None:
            pool.incref(page)
            pool.decref(page)
            return True
        if self.scheduler.n_available_pages <= 0:
            return False
        page = pool.allocate()
        self.kv.write_page(page, data)
        pool.register(page, key)
        pool.decref(page)
        return True

    def fail_all(self, error: BaseException) -> None:
        """End all sequences with an error."""
        self._publish([Output(s, error=error) for s in (*self.scheduler.running, *self.scheduler.waiting)])

    def forget_sequences(self) -> None:
        """Start with an empty KV cache: in a forked child, where the parent's sequences do not run."""
        old = self.scheduler
        pool = PagePool(self.kv.n_pages)
        self.scheduler = Scheduler(pool, old.n_batch, old.n_ctx_orig, old.window, old.kv_connector)

    def close(self) -> None:
        """Close the model; unfinished sequences fail with ModelClosedError."""
        if self._closed:
            return
        self._closed = True
        self.fail_all(ModelClosedError("the model was closed"))
        self.model.close()

    def _remove_cancelled(self) -> list[Output]:
        sequences = (*self.scheduler.running, *self.scheduler.waiting)
        cancelled = [sequence for sequence in sequences if sequence.cancel.is_set()]
        for sequence in cancelled:
            self.scheduler.remove(sequence)
        return [Output(sequence, finish=Finish.CANCELLED) for sequence in cancelled]

    def _max_prefill_tokens(self) -> int:
        """Return how many prefill tokens a step may have beside decoding sequences."""
        if self._seconds_per_token is None:
            return _MIN_PREFILL_TOKENS
        return max(int(self.max_step_seconds / self._seconds_per_token), _MIN_PREFILL_TOKENS)

    def _forward(self, work: list[Work]) -> list[Floats]:
        """Return the output rows of each work: logits [n, n_vocab], or hidden states [n, n_embd]."""
        if not work:
            return []
        batch = [(w.sequence, w.sequence.n_computed, w.n_tokens) for w in work]
        ends = list(accumulate(n for _, _, n in batch))
        n_outputs = [w.n_output_rows for w in work]
        wants_hidden_states = any(sequence.output_from is not None for sequence, _, _ in batch)
        start = time.perf_counter()
        rows = forward(
            self.model,
            self.kv,
            np.array([token for s, first, n in batch for token in s.tokens[first : first + n]], np.int32),
            np.array([position for _, first, n in batch for position in range(first, first + n)], np.int32),
            np.repeat(np.arange(len(batch), dtype=np.int32), [n for _, _, n in batch]),
            [_page_table(sequence.pages) for sequence, _, _ in batch],
            [sequence.long_rope for sequence, _, _ in batch],
            np.array([row for end, n in zip(ends, n_outputs, strict=True) for row in range(end - n, end)], np.int32),
            self.interrupt,
            None,
            wants_hidden_states,
            self.timings,
            [sequence.cancel for sequence, _, _ in batch],
        )
        self._note_speed(ends[-1], time.perf_counter() - start)
        outputs = [rows[end - n : end] for end, n in zip(accumulate(n_outputs), n_outputs, strict=True)]
        sampled = [i for i, w in enumerate(work) if w.wants_logits] if wants_hidden_states else []
        if sampled:
            logits = lm_head(self.model, self.kv, np.concatenate([outputs[i] for i in sampled]))
            for k, i in enumerate(sampled):
                outputs[i] = logits[k : k + 1]
        return outputs

    def _note_speed(self, n_tokens: int, seconds: float) -> None:
        if n_tokens >= _MIN_PREFILL_TOKENS:
            last = seconds / n_tokens
            before = last if self._seconds_per_token is None else self._seconds_per_token
            self._seconds_per_token = before + _RATE_WEIGHT * (last - before)

    @staticmethod
    def _sample(work: Work, rows: Floats) -> Sample | None:
        """Return the next token of work that wants logits, or the error that ends its sequence."""
        if not work.wants_logits:
            return None
        sequence = work.sequence
        if sequence.sampler is None:
            raise AssertionError("a generation request has no sampler")
        try:
            token = sequence.sampler.sample(rows[0], sequence.generated)
            n_top = sequence.n_top_logprobs
            return token, None if n_top is None else logprob(rows[0], token, n_top)
        except Exception as error:  # ends this sequence only
            return error

    def _commit(self, work: list[Work], samples: list[Sample | None], rows: list[Floats]) -> list[Output]:
        """Record work as computed; return its outputs."""
        outputs = []
        for w, sample, states in zip(work, samples, rows, strict=True):
            sequence = w.sequence
            self.scheduler.commit(w)
            if isinstance(sample, Exception):
                outputs.append(Output(sequence, error=sample))
            elif sample is not None:
                token, token_logprob = sample
                sequence.tokens.append(token)
                outputs.append(Output(sequence, token, token_logprob, finish=_finish_reason(sequence)))
            elif sequence.output_from is not None and len(states):
                position = sequence.n_output = sequence.n_computed
                finish = Finish.OUTPUTS_READY if sequence.n_left == 0 else None
                outputs.append(Output(sequence, position=position - len(states), hidden_states=states, finish=finish))
        return outputs

    def _publish(self, outputs: list[Output]) -> None:
        """Put outputs into the queues of their sequences, and remove the sequences that have ended."""
        now = time.perf_counter()
        by_queue: dict[OutputQueue, list[Output]] = {}
        for output in outputs:
            output.time = now
            if output.is_last:
                self.scheduler.remove(output.sequence)
            by_queue.setdefault(output.sequence.outputs, []).append(output)
        for queue, some in by_queue.items():
            queue.put(some)


def _finish_reason(sequence: Sequence) -> Finish | None:
    """Return why a sequence ends with its last token; None if it does not."""
    if sequence.tokens[-1] in sequence.eog_ids:
        return Finish.STOP
    return Finish.LENGTH if len(sequence.tokens) - sequence.n_prompt >= sequence.max_tokens else None


def _page_table(pages: list[int]) -> npt.NDArray[np.int32]:
    # C does not read the entries behind the window, but requires valid page numbers: FREED becomes 0.
    return np.maximum(np.asarray(pages, np.int32), 0)
