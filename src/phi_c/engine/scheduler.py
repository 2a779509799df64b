"""Decides which tokens of which sequences run next, and on which pages."""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from phi_c._core import PAGE_TOKENS
from phi_c.engine.kv_pages import FREED, PagePool, extend_keys, first_needed, usable
from phi_c.engine.sequence import Sequence, Status


@dataclass(frozen=True)
class Work:
    """Tokens n_computed .. n_computed + n_tokens - 1 of a sequence."""

    sequence: Sequence
    n_tokens: int

    @property
    def n_output_rows(self) -> int:
        """How many of these tokens, the last ones, give rows that are wanted."""
        return max(
            self.sequence.n_computed + self.n_tokens - max(self.sequence.output_start, self.sequence.n_computed), 0
        )

    @property
    def wants_logits(self) -> bool:
        """Whether these tokens end what is known of the sequence, so that the next one can be sampled."""
        return self.sequence.output_from is None and self.n_output_rows > 0


def pages_for(n_tokens: int) -> int:
    """Return how many pages so many positions take."""
    return -(-n_tokens // PAGE_TOKENS)


def pages_at_once(n_tokens: int, n_batch: int, window: int | None) -> int:
    """Return how many pages a text of so many tokens holds at most: those of a window and a step, wherever they lie."""
    whole = pages_for(n_tokens)
    return whole if window is None else min(whole, pages_for(window - 1 + min(n_batch, n_tokens) - 1) + 1)


class _Claim(NamedTuple):
    """What a sequence has of the pages that it needs."""

    sequence: Sequence
    n_past: int  # pages of its table that it need not take any more
    held: Collection[int]


class KVConnector(Protocol):
    """Pages kept elsewhere, by key."""

    def refresh(self) -> None:
        """Notice what has changed since."""

    def __contains__(self, key: bytes) -> bool: ...

    def fetch(self, pages: Mapping[bytes, int]) -> bool:
        """Copy the pages of keys into pages of the cache; False where one, no longer contained then, is damaged."""


class Scheduler:
    """First come, first served: a sequence starts when the pages that it may come to need are there.

    n_ctx_orig: positions up to which LongRoPE's short factors hold, None without LongRoPE. A sequence that grows
    beyond is computed anew with the long factors, as transformers does. window: positions that a token sees, itself
    included, None: all. Pages that no later token sees are given back, so a text needs room for the window and a step.
    kv_connector: where pages are looked for that the pool does not hold.
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
        """Queue a sequence; the pages that its n_longest needs at once must fit the whole pool."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """Return the next step's work, at most n_batch tokens: one for each that generates first, then prompts."""
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

    def computed(self, work: Work) -> None:
        """Record that a step ran: its full pages can be shared from now on, and the window moves."""
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
        """Let a sequence go, wherever it is; its pages are free, its prefix stays findable."""
        sequence.status = Status.DONE
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self._stop(sequence)

    def needs_long(self, n_tokens: int) -> bool:
        """Whether a text of so many tokens is rotated by LongRoPE's long factors."""
        return self.n_ctx_orig is not None and n_tokens > self.n_ctx_orig

    @property
    def n_available_pages(self) -> int:
        """Free pages that no running sequence may still take."""
        return self._n_available_pages()

    def _n_available_pages(self, *more: _Claim) -> int:
        """The same with further sequences: negative where there is no room for all."""
        n_needed = 0
        lasting: set[int] = set()
        sliding: set[int] = set()
        for claim in (*(_Claim(s, len(s.pages), s.pages[s.n_freed :]) for s in self.running), *more):
            n_longest = claim.sequence.n_longest
            whole, at_once = pages_for(n_longest), pages_at_once(n_longest, self.n_batch, self.window)
            if at_once < whole:
                n_needed += at_once
                sliding.update(claim.held)
            else:
                n_needed += whole - claim.n_past
                lasting.update(claim.held)
        # What a sliding sequence holds it takes the next pages for, and where several share a page the last one does;
        # it may not count on a page that another one keeps.
        return self.pool.n_free_pages - (n_needed - len(sliding - lasting))

    def _admit(self) -> None:
        while self.waiting:
            sequence = self.waiting[0]
            sequence.long_rope = self.needs_long(len(sequence.tokens))
            extend_keys(sequence.keys, sequence.tokens, sequence.long_rope)
            # One token at least is computed: its row is wanted.
            if self.kv_connector is not None:
                self.kv_connector.refresh()
            keys = sequence.keys[: sequence.output_start // PAGE_TOKENS]
            if not self._allocate_prefix(sequence, keys):
                return
            self.waiting.popleft()
            sequence.n_computed = len(sequence.pages) * PAGE_TOKENS
            if len(sequence.tokens) == sequence.n_prompt:  # else LongRoPE has switched
                sequence.n_cached = sequence.n_computed
            sequence.status = Status.RUNNING
            self.running.append(sequence)

    def _allocate_prefix(self, sequence: Sequence, keys: list[bytes]) -> bool:
        """Give a sequence the pages that are known of its prefix; False where there is no room for the rest."""
        while True:
            span = usable(keys, self.window, self._is_known)
            pages = {i: page for i in span if (page := self.pool.find(keys[i])) is not None}
            for page in pages.values():
                self.pool.incref(page)
            missing = [i for i in span if i not in pages]
            if self._n_available_pages(_Claim(sequence, span.stop - len(missing), pages.values())) < 0:
                self._release(pages.values())
                return False
            taken = {i: self.pool.allocate() for i in missing}
            is_there = not taken
            try:
                if taken and self.kv_connector is not None:
                    is_there = self.kv_connector.fetch({keys[i]: page for i, page in taken.items()})
            finally:  # an interrupt passes through
                if not is_there:
                    self._release([*pages.values(), *taken.values()])
            if is_there:
                break
        for i, page in taken.items():
            self.pool.register(page, keys[i])
        pages |= taken
        sequence.pages = [FREED] * span.start + [pages[i] for i in span]
        sequence.n_freed = span.start
        return True

    def _is_known(self, key: bytes) -> bool:
        return self.pool.find(key) is not None or (self.kv_connector is not None and key in self.kv_connector)

    def _switch_rope(self, sequence: Sequence) -> None:
        if sequence.long_rope or not self.needs_long(len(sequence.tokens)):
            return
        # Its pages may be shared, so that new ones must be found: it is admitted again, before all others.
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
        # The last first: the beginning of a prefix is worth more than its end when room is needed.
        for page in reversed(list(pages)):
            self.pool.decref(page)
