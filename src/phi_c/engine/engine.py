"""The engine step: schedule, forward, sample, emit."""

from collections import deque

import numpy as np
import numpy.typing as npt

from phi_c._core import ENGINE, ForkLock, KvCache, Model, Timings, forward, lm_head
from phi_c.engine.kv_pages import PagePool
from phi_c.engine.scheduler import Scheduler, Work, pages_for
from phi_c.engine.sequence import Finish, Sequence
from phi_c.errors import Cancelled, ModelClosedError
from phi_c.sampling.sampler import logprob

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Engine:
    """Runs sequences on one model and one KV cache. Safe to call from several threads.

    kv_cache_tokens: KV cache capacity in tokens, shared by all sequences.
    n_batch: maximum number of tokens in a step.
    n_ctx_orig, window: see Scheduler.
    kv_type: see KvCache.

    timings: set it to collect the times of all forward passes.
    """

    def __init__(
        self,
        model: Model,
        kv_cache_tokens: int,
        n_batch: int,
        n_ctx_orig: int | None = None,
        kv_type: str = "f16",
        window: int | None = None,
    ) -> None:
        self.model = model
        self.kv = KvCache(model, pages_for(kv_cache_tokens), kv_type)
        self.scheduler = Scheduler(PagePool(self.kv.n_pages), n_batch, n_ctx_orig, window)
        self.timings: Timings | None = None
        self._lock = ForkLock(ENGINE)
        self._removals: deque[Sequence] = deque()  # not applied yet: the lock was held
        self._closed = False

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ModelClosedError."""
        with self._lock:
            self._prepare()
            self.scheduler.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence now, or at the next call if the lock is held. No effect on a sequence that is done.

        Never blocks: the garbage collector closes an abandoned stream in any thread, possibly in the middle of a step
        and in the thread that holds the lock.
        """
        self._removals.append(sequence)
        if not self._lock.locked():
            with self._lock:
                self._apply_removals()

    def step(self, awaited: Sequence) -> None:
        """Run one step for all sequences, unless the awaited one is done.

        Every thread that waits for a sequence drives all of them. Raises the error of the awaited sequence,
        ModelClosedError, and KeyboardInterrupt.
        """
        with self._lock:
            self._prepare()
            if not awaited.is_done:
                self._step(awaited)
        if awaited.error is not None:
            raise awaited.error

    def lm_head(self, hidden_states: Floats) -> Floats:
        """Return the logits, float32 [n, n_vocab], of hidden states after the final norm, float32 [n, n_embd].

        Other sequences run their steps between two calls: pass a few rows at a time. Raises ModelClosedError.
        """
        with self._lock:
            self._prepare()
            return lm_head(self.model, self.kv, hidden_states)

    def registered_keys(self) -> list[bytes]:
        """Return the keys of all registered pages, least recently used first. Raises ModelClosedError."""
        with self._lock:
            self._prepare()
            return self.scheduler.pool.registered_keys()

    @property
    def n_available_pages(self) -> int:
        """Pages that no running sequence may still need. Raises ModelClosedError."""
        with self._lock:
            self._prepare()
            return self.scheduler.n_available_pages

    def read_page(self, key: bytes) -> Bytes | None:
        """Return a copy of a key's page, uint8 [page_bytes], or None if it is not registered."""
        with self._lock:
            self._prepare()
            page = self.scheduler.pool.find(key)
            return None if page is None else self.kv.read_page(page)

    def insert_page(self, key: bytes, data: Bytes) -> bool:
        """Register a page with data from `read_page` as the most recently used one.

        Returns False if running sequences may need all free pages. Raises ModelClosedError.
        """
        with self._lock:
            self._prepare()
            pool = self.scheduler.pool
            page = pool.find(key)
            if page is not None:
                pool.incref(page)
                pool.decref(page)
                return True
            if self.scheduler.n_available_pages <= 0:
                return False
            page = pool.allocate()
            try:
                self.kv.write_page(page, data)
                pool.register(page, key)
            finally:  # also after a KeyboardInterrupt
                pool.decref(page)
            return True

    def close(self) -> None:
        """Close the model; unfinished sequences fail with ModelClosedError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                self._fail(sequence, ModelClosedError("the model was closed"))
        self.model.close()

    def _prepare(self) -> None:
        if self._closed:
            raise ModelClosedError("the model was closed")
        self._apply_removals()

    def _apply_removals(self) -> None:
        while self._removals:
            self.scheduler.remove(self._removals.popleft())

    def _step(self, awaited: Sequence) -> None:
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.cancel is not None and sequence.cancel.is_set():
                self._finish(sequence, Finish.CANCELLED)
        work = self.scheduler.schedule()
        if not work:
            return
        wants_hidden_states = any(w.sequence.output_from is not None for w in work)
        try:
            rows = self._forward(work, awaited, wants_hidden_states)
        except Cancelled:
            return  # the next step removes the cancelled sequence and repeats the work of the others
        outputs = dict(zip(work, np.split(rows, np.cumsum([w.n_output_rows for w in work])[:-1]), strict=True))
        sampled = [w for w in work if w.wants_logits]
        if wants_hidden_states and sampled:
            logits = lm_head(self.model, self.kv, np.concatenate([outputs[w] for w in sampled]))
            outputs.update(zip(sampled, np.split(logits, len(sampled)), strict=True))
        for w in work:
            self._deliver(w, outputs[w])

    def _deliver(self, work: Work, outputs: Floats) -> None:
        """Commit work and pass on its outputs: the logits to sample from, or hidden states.

        Hidden states are stored before the commit. An interrupt in between repeats the work.
        """
        sequence = work.sequence
        if sequence.output_from is None:
            wants_logits = work.wants_logits
            self.scheduler.commit(work)
            if wants_logits:
                try:
                    self._emit(sequence, outputs[0])
                except Exception as error:  # fails this sequence only
                    self._fail(sequence, error)
            return
        if len(outputs):
            sequence.hidden_states[sequence.n_computed + work.n_tokens - len(outputs)] = outputs
        self.scheduler.commit(work)
        if sequence.n_computed == len(sequence.tokens):
            self._finish(sequence, Finish.OUTPUTS_READY)

    def _forward(self, work: list[Work], awaited: Sequence, hidden_states: bool) -> Floats:
        """Return the output rows of all work, concatenated: logits [n, n_vocab], or hidden states [n, n_embd]."""
        counts = [w.n_tokens for w in work]
        starts = [w.sequence.n_computed for w in work]
        tokens = [w.sequence.tokens[start : start + n] for w, start, n in zip(work, starts, counts, strict=True)]
        ends = np.cumsum(counts)
        return forward(
            self.model,
            self.kv,
            np.concatenate([np.asarray(t, np.int32) for t in tokens]),
            np.concatenate([np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, counts, strict=True)]),
            np.repeat(np.arange(len(work), dtype=np.int32), counts),
            [_page_table(w.sequence.pages) for w in work],
            [w.sequence.long_rope for w in work],
            np.concatenate(
                [np.arange(end - w.n_output_rows, end, dtype=np.int32) for w, end in zip(work, ends, strict=True)]
            ),
            awaited.cancel,
            None,
            hidden_states,
            self.timings,
        )

    def _emit(self, sequence: Sequence, logits: Floats) -> None:
        if sequence.sampler is None:
            raise AssertionError("a generation request has no sampler")
        token = sequence.sampler.sample(logits, sequence.generated)
        if sequence.n_top_logprobs is not None:
            sequence.logprobs.append(logprob(logits, token, sequence.n_top_logprobs))
        sequence.tokens.append(token)
        if token in sequence.eog_ids or not sequence.accept(token):
            self._finish(sequence, Finish.STOP)
        elif len(sequence.tokens) - sequence.n_prompt >= sequence.max_tokens:
            self._finish(sequence, Finish.LENGTH)

    def _finish(self, sequence: Sequence, finish: Finish) -> None:
        sequence.finish = finish
        self.scheduler.remove(sequence)

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        sequence.error = error
        self.scheduler.remove(sequence)


def _page_table(pages: list[int]) -> npt.NDArray[np.int32]:
    # C does not read the entries behind the window, but requires valid page numbers: FREED becomes 0.
    return np.maximum(np.asarray(pages, np.int32), 0)
