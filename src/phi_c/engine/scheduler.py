"""Decides which tokens of which sequences run next, and on which pages."""

from collections import deque
from dataclasses import dataclass

from phi_c._core import PAGE_TOKENS
from phi_c.engine.pages import PagePool
from phi_c.engine.sequence import Sequence, Status


@dataclass(frozen=True)
class Work:
    """Tokens n_computed .. n_computed + n_tokens - 1 of a sequence."""

    sequence: Sequence
    n_tokens: int

    @property
    def n_rows(self) -> int:
        """How many of these tokens, the last ones, give rows that are wanted."""
        return max(self.sequence.n_computed + self.n_tokens - max(self.sequence.first_row, self.sequence.n_computed), 0)

    @property
    def wants_logits(self) -> bool:
        """Whether these tokens end what is known of the sequence, so that the next one can be sampled."""
        return self.sequence.rows_from is None and self.n_rows > 0


def pages_for(n_tokens: int) -> int:
    """Return how many pages so many positions take."""
    return -(-n_tokens // PAGE_TOKENS)


class Scheduler:
    """First come, first served: a sequence starts when the pages that it may come to need are there.

    n_ctx_orig: positions up to which LongRoPE's short factors hold, None without LongRoPE. A sequence that grows
    beyond is computed anew with the long factors, as transformers does.
    """

    def __init__(self, pool: PagePool, n_batch: int, n_ctx_orig: int | None = None) -> None:
        self.pool = pool
        self.n_batch = n_batch
        self.n_ctx_orig = n_ctx_orig
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._reserved: dict[Sequence, int] = {}  # pages that running sequences may still take

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its n_longest must fit the whole pool."""
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
                self._grow(sequence, sequence.n_computed + n)
                work.append(Work(sequence, n))
                budget -= n
        return work

    def computed(self, work: Work) -> None:
        """Record that a step ran: its full pages can be shared from now on."""
        sequence = work.sequence
        before, after = sequence.n_computed, sequence.n_computed + work.n_tokens
        for index in range(before // PAGE_TOKENS, after // PAGE_TOKENS):
            self.pool.remember(sequence.pages, index, sequence.tokens, sequence.long_rope)
        sequence.n_computed = after

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence go, wherever it is; its pages are free, its prefix stays findable."""
        sequence.status = Status.DONE
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self._stop(sequence)

    @property
    def n_unpromised(self) -> int:
        """Free pages that no running sequence may still take."""
        return self.pool.n_free - sum(self._reserved.values())

    def _admit(self) -> None:
        while self.waiting:
            sequence = self.waiting[0]
            sequence.long_rope = self._needs_long(len(sequence.tokens))
            # One token at least is computed: its row is wanted.
            found = self.pool.find(sequence.tokens[: sequence.first_row], sequence.long_rope)
            for page in found:
                self.pool.share(page)
            needed = pages_for(sequence.n_longest) - len(found)
            if needed > self.n_unpromised:
                for page in found:
                    self.pool.release(page)
                return
            self.waiting.popleft()
            sequence.pages = found
            sequence.n_computed = len(found) * PAGE_TOKENS
            sequence.n_cached = min(sequence.n_computed, sequence.n_prompt)
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            self._reserved[sequence] = needed

    def _grow(self, sequence: Sequence, n_tokens: int) -> None:
        while len(sequence.pages) < pages_for(n_tokens):
            sequence.pages.append(self.pool.take())
            self._reserved[sequence] -= 1

    def _needs_long(self, n_tokens: int) -> bool:
        return self.n_ctx_orig is not None and n_tokens > self.n_ctx_orig

    def _switch_rope(self, sequence: Sequence) -> None:
        if sequence.long_rope or not self._needs_long(len(sequence.tokens)):
            return
        # Its pages may be shared, so that new ones must be found: it is admitted again, before all others.
        self._stop(sequence)
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        del self._reserved[sequence]
        # The last first: the beginning of a prefix is worth more than its end when room is needed.
        for page in reversed(sequence.pages):
            self.pool.release(page)
        sequence.pages = []
        sequence.n_computed = 0
