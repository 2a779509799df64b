"""The scheduler against an oracle, as a Hypothesis state machine: sequences are added, run, paused, preempted and
cancelled, and each page records the prefix that its content depends on."""

from collections.abc import Mapping

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from phi_c._core import PAGE_TOKENS
from phi_c.engine.kv_pages import FREED, PagePool
from phi_c.engine.scheduler import Scheduler, Work, max_resident_pages, pages_for
from phi_c.engine.sequence import Sequence, Status
from phi_c.sampling.params import SamplingParams
from phi_c.sampling.sampler import Sampler

SAMPLER = Sampler(SamplingParams(), 10)
Slots = dict[int, tuple[object, ...]]  # position in a page -> the whole prefix that its content depends on


class DictConnector:
    """A KVConnector that stores pages in a dictionary; some are marked as corrupt."""

    def __init__(self, content: list[Slots]) -> None:
        self.content = content
        self.stored: dict[bytes, Slots] = {}
        self.corrupt: set[bytes] = set()

    def refresh(self) -> None:
        pass

    def __contains__(self, key: bytes) -> bool:
        return key in self.stored

    def fetch(self, pages: Mapping[bytes, int]) -> bool:
        for key in pages:
            if key in self.corrupt:
                del self.stored[key]
                self.corrupt.remove(key)
                return False
        for key, page in pages.items():
            self.content[page] = dict(self.stored[key])
        return True


class SchedulerMachine(RuleBasedStateMachine):
    """Runs steps as the engine does, with a dictionary per page instead of keys and values."""

    @initialize(
        window=st.none() | st.integers(1, 150) | st.integers(33, 70),
        n_batch=st.integers(1, 12) | st.integers(1, 100),
        n_pages=st.integers(4, 14),
        n_ctx_orig=st.none() | st.integers(0, 200),
        max_prefill_tokens=st.none() | st.integers(1, 40),
    )
    def start(
        self, window: int | None, n_batch: int, n_pages: int, n_ctx_orig: int | None, max_prefill_tokens: int | None
    ) -> None:
        self.max_prefill_tokens = max_prefill_tokens
        self.window, self.n_batch, self.n_ctx_orig = window, n_batch, n_ctx_orig
        self.pool = PagePool(n_pages)
        self.content: list[Slots] = [{} for _ in range(n_pages)]
        self.kv_connector = DictConnector(self.content)
        self.scheduler = Scheduler(self.pool, n_batch, n_ctx_orig, window, self.kv_connector)
        self.all: list[Sequence] = []
        self.earlier: list[list[int]] = []

    @rule(
        data=st.data(),
        n_new=st.integers(1, 300),
        max_tokens=st.integers(1, 120),
        letter=st.integers(0, 1),
        priority=st.integers(-1, 1),
    )
    def add(self, data: st.DataObject, n_new: int, max_tokens: int, letter: int, priority: int) -> None:
        """Add a sequence, often one that shares a prefix with an earlier one."""
        tokens: list[int] = []
        if self.earlier and data.draw(st.booleans()):
            earlier = data.draw(st.sampled_from(self.earlier))
            tokens = earlier[: data.draw(st.integers(0, len(earlier)))]
        sequence = Sequence([*tokens, *[letter] * n_new], max_tokens, SAMPLER, frozenset(), priority=priority)
        if max_resident_pages(sequence.max_positions, self.n_batch, self.window) <= self.pool.n_pages:
            self.scheduler.add(sequence)
            self.all.append(sequence)

    @rule(n=st.integers(1, 60))
    def steps(self, n: int) -> None:
        for _ in range(n):
            self.step()
            self.reference_counts_are_exact()

    def step(self) -> None:
        work = self.scheduler.schedule(self.max_prefill_tokens)
        assert sum(w.n_tokens for w in work) <= self.n_batch
        assert bool(work) is not self.scheduler.is_idle
        n_decoding = sum(w.sequence.n_left == 1 for w in work)
        if self.max_prefill_tokens is not None and n_decoding:
            assert sum(w.n_tokens for w in work) <= n_decoding + self.max_prefill_tokens
        for w in work:
            assert not w.sequence.outputs.is_full
        for w in work:
            self.compute(w)
        for w in work:
            wants_logits = w.wants_logits
            self.scheduler.commit(w)
            if wants_logits:
                self.emit(w.sequence)

    @rule()
    def interrupted_step(self) -> None:
        """As after a cancel: pages are written, but nothing is committed."""
        for w in self.scheduler.schedule():
            self.compute(w)

    def compute(self, work: Work) -> None:
        s = work.sequence
        assert s.long_rope is (self.n_ctx_orig is not None and len(s.tokens) > self.n_ctx_orig)
        for p in range(s.n_computed, s.n_computed + work.n_tokens):
            first = 0 if self.window is None else max(p + 1 - self.window, 0)
            for position in range(first, p):
                slots = self.content[s.pages[position // PAGE_TOKENS]]
                assert s.pages[position // PAGE_TOKENS] != FREED
                assert slots[position % PAGE_TOKENS] == (s.long_rope, *s.tokens[: position + 1])
            self.content[s.pages[p // PAGE_TOKENS]][p % PAGE_TOKENS] = (s.long_rope, *s.tokens[: p + 1])

    def emit(self, s: Sequence) -> None:
        s.tokens.append(len(s.tokens) % 3)
        if len(s.tokens) - s.n_prompt >= s.max_tokens:
            self.earlier.append(s.tokens)
            self.scheduler.remove(s)

    @precondition(lambda self: self.scheduler.running or self.scheduler.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        s = data.draw(st.sampled_from([*self.scheduler.running, *self.scheduler.waiting]))
        self.earlier.append(s.tokens)
        self.scheduler.remove(s)

    @precondition(lambda self: self.scheduler.running or self.scheduler.waiting)
    @rule(data=st.data())
    def pause_or_continue(self, data: st.DataObject) -> None:
        """Let an output queue become full, or its reader make room."""
        s = data.draw(st.sampled_from([*self.scheduler.running, *self.scheduler.waiting]))
        s.outputs.max_unread = 0 if s.outputs.max_unread else 1

    @rule()
    def store_pages(self) -> None:
        for key in self.pool.registered_keys():
            page = self.pool.find(key)
            assert page is not None
            self.kv_connector.stored[key] = dict(self.content[page])

    @precondition(lambda self: self.kv_connector.stored)
    @rule(data=st.data())
    def corrupt_page(self, data: st.DataObject) -> None:
        self.kv_connector.corrupt.add(data.draw(st.sampled_from(sorted(self.kv_connector.stored))))

    @invariant()
    def reference_counts_are_exact(self) -> None:
        if not hasattr(self, "pool"):
            return
        referenced = [page for s in self.scheduler.running for page in s.pages[s.n_freed :]]
        assert FREED not in referenced
        assert all(page == FREED for s in self.scheduler.running for page in s.pages[: s.n_freed])
        for page in range(self.pool.n_pages):
            assert self.pool.ref_count(page) == referenced.count(page)
        assert self.pool.n_free_pages == self.pool.n_pages - len(set(referenced))
        assert self.scheduler.n_available_pages >= 0
        for s in self.scheduler.running:
            assert len(s.pages) - s.n_freed <= max_resident_pages(s.max_positions, self.n_batch, self.window)
        for s in self.all:
            assert s.status is not Status.DONE or not s.pages

    @invariant()
    def registered_pages_are_full(self) -> None:
        if not hasattr(self, "pool"):
            return
        for key in self.pool.registered_keys():
            page = self.pool.find(key)
            assert page is not None
            longest = max(self.content[page].values(), key=len)
            assert len(longest) % PAGE_TOKENS == 1  # long_rope, and the tokens of whole pages
            assert set(self.content[page]) == set(range(PAGE_TOKENS))

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for s in self.all:
            s.outputs.max_unread = 1
        for _ in range(10_000):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            self.step()
        assert not self.scheduler.waiting, "a sequence waits forever"
        assert self.pool.n_free_pages == self.scheduler.n_available_pages == self.pool.n_pages


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=30, suppress_health_check=list(HealthCheck))


def test_max_resident_pages_is_the_maximum_over_all_steps() -> None:
    for window in (1, 2, 31, 32, 33, 64, 65, 100):
        for n_batch in (1, 2, 31, 32, 33, 64):
            maximum = 0
            for start in range(400):  # n_batch tokens from `start` attend to start + 1 - window ..
                end = start + n_batch
                first = max(start + 1 - window, 0) // PAGE_TOKENS
                maximum = max(maximum, pages_for(end) - first)
            assert max_resident_pages(10**6, n_batch, window) == maximum
