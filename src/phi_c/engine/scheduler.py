"""The scheduler: which tokens of which sequences run in the next step, and on which KV cache pages."""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from phi_c._core import PAGE_TOKENS
from phi_c.engine.kv_pages import FREED, PagePool, extend_keys, first_needed, usable_prefix
from phi_c.engine.sequence import Sequence, Status


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


class _Claim(NamedTuple):
    """A sequence and the pages it has, for counting the pages it may still need."""

    sequence: Sequence
    n_filled: int  # entries of its page table that need no new page
    pages: Collection[int]  # pages it holds


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
    """First come, first served: a sequence is admitted when all the pages that it may need are available.

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
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its `max_resident_pages` must not exceed the size of the pool."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """Return the work of the next step, at most n_batch tokens: first all decoding sequences, then prefill."""
        for sequence in list(self.running):
            self._switch_rope(sequence)
        self._admit()
        budget = self.n_batch
        work = []
        for sequence in sorted(self.running, key=lambda s: len(s.tokens) - s.n_computed > 1):
            n = min(budget, len(sequence.tokens) - sequence.n_computed)
            if n > 0:
                while len(sequence.pages) < pages_for(sequence.n_computed + n):
                    sequence.pages.append(self.pool.allocate())
                work.append(Work(sequence, n))
                budget -= n
        return work

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
        sequence.status = Status.DONE
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self._stop(sequence)

    def needs_long_rope(self, n_tokens: int) -> bool:
        """Whether a sequence of n_tokens uses LongRoPE's long factors."""
        return self.n_ctx_orig is not None and n_tokens > self.n_ctx_orig

    @property
    def n_available_pages(self) -> int:
        """Free pages that no running sequence may still need."""
        return self._pages_left()

    def _pages_left(self, *candidates: _Claim) -> int:
        """Return n_available_pages as if the candidates were running; negative if there is no room for all."""
        n_needed = 0
        lasting: set[int] = set()  # pages of sequences that never free any
        sliding: set[int] = set()  # pages that will be freed behind the window
        for claim in (*(_Claim(s, len(s.pages), s.pages[s.n_freed :]) for s in self.running), *candidates):
            max_positions = claim.sequence.max_positions
            whole, resident = pages_for(max_positions), max_resident_pages(max_positions, self.n_batch, self.window)
            if resident < whole:
                n_needed += resident
                sliding.update(claim.pages)
            else:
                n_needed += whole - claim.n_filled
                lasting.update(claim.pages)
        # A sliding sequence exchanges the pages it holds for later ones. A page that several of them share becomes free
        # once, when the last one drops it; a page that a lasting sequence holds as well does not become free.
        return self.pool.n_free_pages - (n_needed - len(sliding - lasting))

    def _admit(self) -> None:
        while self.waiting:
            sequence = self.waiting[0]
            sequence.long_rope = self.needs_long_rope(len(sequence.tokens))
            extend_keys(sequence.keys, sequence.tokens, sequence.long_rope)
            if self.kv_connector is not None:
                self.kv_connector.refresh()
            # Positions with an output are computed in any case.
            keys = sequence.keys[: sequence.output_start // PAGE_TOKENS]
            if not self._allocate_prefix(sequence, keys):
                return
            self.waiting.popleft()
            sequence.n_computed = len(sequence.pages) * PAGE_TOKENS
            if len(sequence.tokens) == sequence.n_prompt:  # else it is recomputed after the LongRoPE switch
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
            if self._pages_left(_Claim(sequence, prefix.stop - len(missing), pages.values())) < 0:
                self._release(pages.values())
                return False
            allocated = {i: self.pool.allocate() for i in missing}
            is_complete = not allocated
            try:
                if allocated and self.kv_connector is not None:
                    is_complete = self.kv_connector.fetch({keys[i]: page for i, page in allocated.items()})
            finally:  # also after a KeyboardInterrupt
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

    def _switch_rope(self, sequence: Sequence) -> None:
        if sequence.long_rope or not self.needs_long_rope(len(sequence.tokens)):
            return
        # Its pages may be shared, so it needs new ones: it is admitted again, before all others.
        self._stop(sequence)
        sequence.keys = []
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence.pages[sequence.n_freed :])
        sequence.pages = []
        sequence.n_freed = 0
        sequence.n_computed = 0

    def _release(self, pages: Collection[int]) -> None:
        # From the end, which is evicted first then: more sequences share the beginning of a prefix.
        for page in reversed(list(pages)):
            self.pool.decref(page)
