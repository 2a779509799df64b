"""One step at a time: schedule, forward, sample, emit."""

from collections import deque

import numpy as np
import numpy.typing as npt

from phi_c._core import ENGINE, ForkLock, KvCache, Model, forward, lm_head
from phi_c.engine.kv_pages import PagePool
from phi_c.engine.scheduler import Scheduler, Work, pages_for
from phi_c.engine.sequence import Finish, Sequence
from phi_c.errors import Cancelled, ModelClosedError
from phi_c.sampling.sampler import logprob

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Engine:
    """Runs sequences on one model and one KV cache; safe to call from several threads.

    kv_cache_tokens: positions that all running sequences share; n_ctx_orig, window: see Scheduler; kv: see KvCache.
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
        self._lock = ForkLock(ENGINE)
        self._leaving: deque[Sequence] = deque()  # removed while the lock was held
        self._closed = False

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises ModelClosedError."""
        with self._lock:
            self._begin()
            self.scheduler.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence go, now or before the next call does its work; harmless when it is gone.

        A stream that nobody refers to any more is closed by the garbage collector, which may run in the middle of a
        step, in the very thread that holds the lock: then this must not wait for it.
        """
        self._leaving.append(sequence)
        if not self._lock.locked():
            with self._lock:
                self._let_go()

    def step(self, watched: Sequence) -> None:
        """Run one step for every sequence, unless another thread has just finished the watched one.

        Whoever waits for a sequence drives all of them. Raises what made the watched one fail, and KeyboardInterrupt.
        """
        with self._lock:
            self._begin()
            if not watched.is_done:
                self._step(watched)
        if watched.error is not None:
            raise watched.error

    def lm_head(self, rows: Floats) -> Floats:
        """Return the logits, float32 [n, n_vocab], of rows [n, n_embd] of a sequence that is read.

        Between two calls the sequences that run get their steps, so a few rows at a time keep nobody waiting.
        """
        with self._lock:
            self._begin()
            return lm_head(self.model, self.kv, rows)

    def known_keys(self) -> list[bytes]:
        """Return the keys of the pages that can be found, the longest unused first; raises ModelClosedError."""
        with self._lock:
            self._begin()
            return self.scheduler.pool.registered_keys()

    @property
    def n_pages_free(self) -> int:
        """Pages that no running sequence may come to need; raises ModelClosedError."""
        with self._lock:
            self._begin()
            return self.scheduler.n_available_pages

    def read_page(self, key: bytes) -> Bytes | None:
        """Return a copy of the page that a key stands for, uint8 [page_bytes], or None where it is not known."""
        with self._lock:
            self._begin()
            page = self.scheduler.pool.find(key)
            return None if page is None else self.kv.read_page(page)

    def insert_page(self, key: bytes, data: Bytes) -> bool:
        """Make what `read_page` gave findable, as the one used last; False where running sequences need the room."""
        with self._lock:
            self._begin()
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
            finally:  # an interrupt passes through
                pool.decref(page)
            return True

    def close(self) -> None:
        """Stop; sequences that still run get ModelClosedError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                self._fail(sequence, ModelClosedError("the model was closed"))
        self.model.close()

    def _begin(self) -> None:
        if self._closed:
            raise ModelClosedError("the model was closed")
        self._let_go()

    def _let_go(self) -> None:
        while self._leaving:
            self.scheduler.remove(self._leaving.popleft())

    def _step(self, watched: Sequence) -> None:
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.cancel is not None and sequence.cancel.is_set():
                self._finish(sequence, Finish.CANCELLED)
        work = self.scheduler.schedule()
        if not work:
            return
        wants_hidden_states = any(w.sequence.output_from is not None for w in work)
        try:
            found = self._forward(work, watched, wants_hidden_states)
        except Cancelled:
            return  # what was cancelled is taken out at the next step, the others go on
        rows = dict(zip(work, np.split(found, np.cumsum([w.n_output_rows for w in work])[:-1]), strict=True))
        wanting = [w for w in work if w.wants_logits]
        if wants_hidden_states and wanting:
            logits = lm_head(self.model, self.kv, np.concatenate([rows[w] for w in wanting]))
            rows.update(zip(wanting, np.split(logits, len(wanting)), strict=True))
        for w in work:
            self._deliver(w, rows[w])

    def _deliver(self, work: Work, rows: Floats) -> None:
        """Give a sequence its rows: the one to sample from, or those that are read.

        Work is recorded as computed once what is read of it was taken, so what an interrupt leaves undone runs again.
        """
        sequence = work.sequence
        if sequence.output_from is None:
            wants_logits = work.wants_logits
            self.scheduler.computed(work)
            if wants_logits:
                try:
                    self._emit(sequence, rows[0])
                except Exception as error:  # one request's fault is not the others'
                    self._fail(sequence, error)
            return
        if len(rows):
            sequence.rows[sequence.n_computed + work.n_tokens - len(rows)] = rows
        self.scheduler.computed(work)
        if sequence.n_computed == len(sequence.tokens):
            self._finish(sequence, Finish.OUTPUTS_READY)

    def _forward(self, work: list[Work], watched: Sequence, hidden_states: bool) -> Floats:
        """Return the wanted rows of all work, one after the other: logits, or what the head takes."""
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
            [_table(w.sequence.pages) for w in work],
            [w.sequence.long_rope for w in work],
            np.concatenate(
                [np.arange(end - w.n_output_rows, end, dtype=np.int32) for w, end in zip(work, ends, strict=True)]
            ),
            watched.cancel,
            None,
            hidden_states,
        )

    def _emit(self, sequence: Sequence, logits: Floats) -> None:
        if sequence.sampler is None:
            raise AssertionError("a sequence that is not read has a sampler")
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


def _table(pages: list[int]) -> npt.NDArray[np.int32]:
    # C reads no entry before the window; page 0 is one that exists.
    return np.maximum(np.asarray(pages, np.int32), 0)
