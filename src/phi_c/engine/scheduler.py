"""The scheduler: which tokens of which sequences run in the next step, and on which KV cache pages."""

from bisect import insort
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from phi_c._core import PAGE_TOKENS
from phi_c.engine.kv_pages import FREED, PagePool, extend_keys, first_needed, usable_prefix
from phi_c.engine.sequence import Sequence, Status
from phi_c.errors import ContextLengthError


@dataclass(frozen=True)
class Work:
    """Tokens n_computed .. n_computed + n_tokens - 1 of a sequence, to be computed in one step."""

    sequence: Sequence
    n_tokens: int

    @property
    def n_output_rows(self) -> int:
        """Number of these tokens, the last ones, that have an output (logits or hidden states)."""
        return max(
            self.sequence.n_computed + self.n_tokens - max(self.sequence.output_start, self.sequence.n_computed), 0
        )

    @property
    def wants_logits(self) -> bool:
        """Whether the next token of a generation request is sampled after this work."""
        return self.sequence.output_from is None and self.n_output_rows > 0


def pages_for(n_tokens: int) -> int:
    """Return the number of pages that n_tokens positions take."""
    return -(-n_tokens // PAGE_TOKENS)


def max_resident_pages(n_tokens: int, n_batch: int, window: int | None) -> int:
    """Return the maximum number of pages that a sequence of n_tokens holds at a time.

    With a sliding window these are the pages of the window and of one step, at any alignment.
    """
    whole = pages_for(n_tokens)
    return whole if window is None else min(whole, pages_for(window - 1 + min(n_batch, n_tokens) - 1) + 1)


class KVConnector(Protocol):
    """A second-level cache of KV pages by prefix key."""

    def refresh(self) -> None:
        """Update the index of cached keys."""

    def __contains__(self, key: bytes) -> bool: ...

    def fetch(self, pages: Mapping[bytes, int]) -> bool:
        """Copy the pages of keys into pages of the KV cache.

        Returns False if one of them is gone or corrupt; the connector then no longer contains it.
        """


class Scheduler:
    """Decides which tokens run in a step, and on which pages. Sequences take pages as their tokens come.

    A sequence is admitted when there is room for the tokens it has; by priority, then in the order of submission. If
    no page is free, a running one is preempted: it gives its pages back and is recomputed later. A sequence whose
    output queue is full is not scheduled, and is the first to be preempted.

    n_batch: maximum number of tokens in a step.
    n_ctx_orig: largest sequence length that uses LongRoPE's short factors; None: no LongRoPE. A sequence that grows
        beyond it is recomputed with the long factors, as in transformers.
    window: number of positions that a token attends to, itself included; None: all. Pages behind the window are freed,
        so a sequence needs room for its window and one step only.
    kv_connector: where to look for pages that the pool does not hold.
    """

    def __init__(
        self,
        pool: PagePool,
        n_batch: int,
        n_ctx_orig: int | None = None,
        window: int | None = None,
        kv_connector: KVConnector | None = None,
    ) -> None:
        self.pool = pool
        self.n_batch = n_batch
        self.n_ctx_orig = n_ctx_orig
        self.window = window
        self.kv_connector = kv_connector
        self.waiting: list[Sequence] = []  # sorted by _rank
        self.running: list[Sequence] = []
        self._n_arrivals = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ContextLengthError if the pool is too small for it alone."""
        n_pages = max_resident_pages(sequence.max_positions, self.n_batch, self.window)
        if n_pages > self.pool.n_pages:  # it would be preempted forever
            raise ContextLengthError(
                f"a sequence of {sequence.max_positions} tokens needs {n_pages * PAGE_TOKENS} tokens of KV cache, "
                f"more than its {self.pool.n_pages * PAGE_TOKENS}"
            )
        sequence.arrival = self._n_arrivals
        self._n_arrivals += 1
        insort(self.waiting, sequence, key=_rank)

    @property
    def is_idle(self) -> bool:
        """Whether no sequence can run: there are none, or nobody reads their outputs."""
        return all(sequence.outputs.is_full for sequence in (*self.running, *self.waiting))

    def schedule(self, max_prefill_tokens: int | None = None) -> list[Work]:
        """Return the work of the next step, at most n_batch tokens: first all decoding sequences, then prefill.

        Prompts are computed one after the other, except that short ones overtake long ones.

        max_prefill_tokens: limit of the prefill tokens beside decoding sequences; None: n_batch.
        """
        for sequence in list(self.running):
            if not sequence.long_rope and self.needs_long_rope(len(sequence.tokens)):
                self._preempt(sequence)  # its pages may be shared, so it needs new ones
        self._admit()
        work: dict[Sequence, Work] = {}
        active = sorted((s for s in self.running if not s.outputs.is_full), key=_rank)
        decoding = [s for s in active if s.n_left == 1]
        budget = self.n_batch
        for sequence in decoding[:budget]:
            self._add_work(work, sequence, 1)
        budget -= len(work)
        if work and max_prefill_tokens is not None:
            budget = min(budget, max_prefill_tokens)
        prefilling = [s for s in active if s.n_left > 1]
        share = budget // max(len(prefilling), 1)
        # Those that a fair share completes go first, so that a short prompt does not wait for a long one.
        for sequence in sorted(prefilling, key=lambda s: s.n_left > share):
            n = min(budget, sequence.n_left)
            if n > 0 and sequence.status is Status.RUNNING:
                self._add_work(work, sequence, n)
                budget -= n
        return list(work.values())

    def commit(self, work: Work) -> None:
        """Record work as computed: register the pages it filled, and free those that are now behind the window."""
        sequence = work.sequence
        before, after = sequence.n_computed, sequence.n_computed + work.n_tokens
        extend_keys(sequence.keys, sequence.tokens, sequence.long_rope)
        for index in range(before // PAGE_TOKENS, after // PAGE_TOKENS):
            self.pool.register(sequence.pages[index], sequence.keys[index])
        sequence.n_computed = after
        first = first_needed(after, self.window)
        for index in range(sequence.n_freed, first):
            self.pool.decref(sequence.pages[index])
            sequence.pages[index] = FREED
        sequence.n_freed = max(sequence.n_freed, first)

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence and release its pages; registered ones stay findable."""
        if sequence in self.running:
            self._release_sequence(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = Status.DONE

    def needs_long_rope(self, n_tokens: int) -> bool:
        """Whether a sequence of n_tokens uses LongRoPE's long factors."""
        return self.n_ctx_orig is not None and n_tokens > self.n_ctx_orig

    @property
    def n_available_pages(self) -> int:
        """Free pages that no running sequence needs for the tokens it has."""
        claimed = sum(max(self._n_pages_for(s) - (len(s.pages) - s.n_freed), 0) for s in self.running)
        return max(self.pool.n_free_pages - claimed, 0)

    def _n_pages_for(self, sequence: Sequence) -> int:
        """Return the number of pages that a sequence holds at a time until all its tokens are computed."""
        return max_resident_pages(len(sequence.tokens), self.n_batch, self.window)

    def _may_grow(self, sequence: Sequence) -> bool:
        """Whether a sequence may need more pages than for the tokens that it has."""
        return max_resident_pages(sequence.max_positions, self.n_batch, self.window) > self._n_pages_for(sequence)

    def _add_work(self, work: dict[Sequence, Work], sequence: Sequence, n_tokens: int) -> None:
        """Add n_tokens of a running sequence to the work, unless it or others of the work have to be preempted."""
        if sequence.status is not Status.RUNNING:  # preempted by one before it
            return
        while len(sequence.pages) < pages_for(sequence.n_computed + n_tokens):
            while self.pool.n_free_pages == 0:
                victim = max(self.running, key=lambda s: (s.outputs.is_full, _rank(s)))
                self._preempt(victim)
                work.pop(victim, None)
                if victim is sequence:
                    return
            sequence.pages.append(self.pool.allocate())
        work[sequence] = Work(sequence, n_tokens)

    def _admit(self) -> None:
        """Start waiting sequences as far as there is room; those that nobody reads make room for others."""
        for sequence in list(self.waiting):
            if sequence.outputs.is_full:
                continue
            sequence.long_rope = self.needs_long_rope(len(sequence.tokens))
            extend_keys(sequence.keys, sequence.tokens, sequence.long_rope)
            if self.kv_connector is not None:
                self.kv_connector.refresh()
            # Positions with an output are computed in any case.
            keys = sequence.keys[: sequence.output_start // PAGE_TOKENS]
            while not self._allocate_prefix(sequence, keys):
                unread = [s for s in self.running if s.outputs.is_full]
                if not unread:
                    return
                self._preempt(max(unread, key=_rank))
            self.waiting.remove(sequence)
            sequence.n_computed = len(sequence.pages) * PAGE_TOKENS
            if sequence.n_cached is None:
                sequence.n_cached = sequence.n_computed
            sequence.status = Status.RUNNING
            self.running.append(sequence)

    def _allocate_prefix(self, sequence: Sequence, keys: list[bytes]) -> bool:
        """Give a sequence the cached pages of its prefix. Returns False if there is no room for its other pages."""
        while True:
            prefix = usable_prefix(keys, self.window, self._is_cached)
            pages = {i: page for i in prefix if (page := self.pool.find(keys[i])) is not None}
            for page in pages.values():
                self.pool.incref(page)
            missing = [i for i in prefix if i not in pages]
            n_new = max(self._n_pages_for(sequence) - len(pages), 0)
            # Others may soon take one more each: without that room, one of them would be preempted.
            n_growing = sum(self._may_grow(s) for s in self.running)
            if self.running and self.n_available_pages < n_new + n_growing:
                self._release(pages.values())
                return False
            allocated = {i: self.pool.allocate() for i in missing}
            is_complete = not allocated
            try:
                if allocated and self.kv_connector is not None:
                    is_complete = self.kv_connector.fetch({keys[i]: page for i, page in allocated.items()})
            finally:  # also after an exception
                if not is_complete:
                    self._release([*pages.values(), *allocated.values()])
            if is_complete:
                break
        for i, page in allocated.items():
            self.pool.register(page, keys[i])
        pages |= allocated
        sequence.pages = [FREED] * prefix.start + [pages[i] for i in prefix]
        sequence.n_freed = prefix.start
        return True

    def _is_cached(self, key: bytes) -> bool:
        return self.pool.find(key) is not None or (self.kv_connector is not None and key in self.kv_connector)

    def _preempt(self, sequence: Sequence) -> None:
        """Take the pages of a running sequence; it is admitted again, and recomputed."""
        self._release_sequence(sequence)
        sequence.keys = []  # with other LongRoPE factors they may differ
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_rank)

    def _release_sequence(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence.pages[sequence.n_freed :])
        sequence.pages = []
        sequence.n_freed = 0
        sequence.n_computed = 0

    def _release(self, pages: Collection[int]) -> None:
        # From the end, which is evicted first then: more sequences share the beginning of a prefix.
        for page in reversed(list(pages)):
            self.pool.decref(page)


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Return the sort key of a sequence: higher priorities first, then in the order of submission."""
    return -sequence.priority, sequence.arrival
