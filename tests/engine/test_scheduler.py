"""The scheduler: admission, batches, page tables, sliding windows, LongRoPE switch."""

from collections.abc import Mapping

import pytest

from phi_c._core import PAGE_TOKENS
from phi_c.engine.kv_pages import FREED, PagePool, extend_keys
from phi_c.engine.scheduler import Scheduler, pages_for
from phi_c.engine.sequence import Sequence, Status
from phi_c.errors import ContextLengthError
from phi_c.sampling.params import SamplingParams
from phi_c.sampling.sampler import Sampler


def sequence(n_prompt: int, max_tokens: int = 8, first: int = 0) -> Sequence:
    tokens = list(range(first, first + n_prompt))
    return Sequence(tokens, max_tokens, Sampler(SamplingParams(), 10), frozenset())


def run(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """Run a step as the engine does; every sampled token is 7."""
    work = scheduler.schedule()
    for w in work:
        wants_logits = w.wants_logits
        scheduler.commit(w)
        if wants_logits:
            w.sequence.tokens.append(7)
    return [(w.sequence, w.n_tokens) for w in work]


def run_until(scheduler: Scheduler, s: Sequence, n_generated: int) -> None:
    """Run steps until a sequence has generated n_generated tokens."""
    while len(s.tokens) - s.n_prompt < n_generated:
        run(scheduler)
        assert scheduler.n_available_pages >= 0


def test_prefill_in_chunks_then_decode() -> None:
    scheduler = Scheduler(PagePool(16), n_batch=20)
    s = sequence(45)
    scheduler.add(s)
    assert [run(scheduler) for _ in range(5)] == [[(s, 20)], [(s, 20)], [(s, 5)], [(s, 1)], [(s, 1)]]


def test_decode_precedes_prefill_in_a_batch() -> None:
    scheduler = Scheduler(PagePool(32), n_batch=20)
    a, b = sequence(10), sequence(50, first=100)
    scheduler.add(a)
    run(scheduler)
    scheduler.add(b)
    assert run(scheduler) == [(a, 1), (b, 19)]


def test_sequence_waits_for_room_for_its_tokens() -> None:
    scheduler = Scheduler(PagePool(4), n_batch=512)
    a, b = sequence(3 * PAGE_TOKENS, 20), sequence(PAGE_TOKENS, 40, first=500)
    small = sequence(3, 3, first=900)
    for s in (a, b, small):
        scheduler.add(s)
    assert [s for s, _ in run(scheduler)] == [a]
    assert b.status is Status.WAITING
    assert small.status is Status.WAITING  # was queued later
    scheduler.remove(a)
    assert [s for s, _ in run(scheduler)] == [b, small]
    for s in (b, small):
        scheduler.remove(s)
    assert scheduler.n_available_pages == 4


def test_pages_come_with_the_tokens_and_the_youngest_is_preempted() -> None:
    scheduler = Scheduler(PagePool(6), n_batch=512)
    sequences = [sequence(5, 3 * PAGE_TOKENS, first=first) for first in (0, 100, 200)]
    for s in sequences:
        scheduler.add(s)
    assert [s for s, _ in run(scheduler)] == sequences  # each may need 4 pages; together they have 6
    a, b, c = sequences
    run_until(scheduler, a, 2 * PAGE_TOKENS - 4)
    assert scheduler.pool.n_free_pages == 0
    run(scheduler)  # a needs its third page
    assert c.status is Status.WAITING
    assert (c.pages, c.n_computed, len(c.generated)) == ([], 0, 2 * PAGE_TOKENS - 4)
    generated = list(c.generated)
    for s in (a, b):
        run_until(scheduler, s, s.max_tokens)
        scheduler.remove(s)
    run(scheduler)
    assert c.status is Status.RUNNING
    assert c.generated[: len(generated)] == generated
    assert c.n_cached == 0  # of its first admission
    run_until(scheduler, c, c.max_tokens)
    scheduler.remove(c)
    assert scheduler.n_available_pages == 6


def test_sequence_that_never_fits_is_an_error() -> None:
    scheduler = Scheduler(PagePool(2), n_batch=512)
    with pytest.raises(
        ContextLengthError, match="a sequence of 65 tokens needs 96 tokens of KV cache, more than its 64"
    ):
        scheduler.add(sequence(60, 6))
    scheduler.add(sequence(60, 5))
    assert scheduler.schedule()


def test_higher_priority_is_admitted_first_and_preempted_last() -> None:
    scheduler = Scheduler(PagePool(4), n_batch=512)
    blocking = sequence(4 * PAGE_TOKENS - 1, 2)
    low, high = sequence(5, 100, first=100), sequence(5, 100, first=200)
    low.priority, high.priority = -1, 1
    for s in (blocking, low, high):
        scheduler.add(s)
    run(scheduler)
    scheduler.remove(blocking)
    assert scheduler.schedule()[0].sequence is high
    assert scheduler.running == [high, low]
    run_until(scheduler, high, 3 * PAGE_TOKENS)
    assert low.status is Status.WAITING


def test_sequence_that_nobody_reads_is_not_scheduled_and_makes_room() -> None:
    scheduler = Scheduler(PagePool(6), n_batch=512)
    unread = sequence(4 * PAGE_TOKENS, 50)
    scheduler.add(unread)
    run(scheduler)
    unread.outputs.max_unread = 0
    assert scheduler.is_idle
    assert scheduler.schedule() == []
    assert unread.status is Status.RUNNING  # there is room
    other = sequence(2 * PAGE_TOKENS, 2, first=500)
    scheduler.add(other)
    assert not scheduler.is_idle
    assert [s for s, _ in run(scheduler)] == [other]
    assert unread.status is Status.WAITING
    later = sequence(3, 2, first=900)
    scheduler.add(later)  # the unread one, which came first, does not block it
    assert later in [s for s, _ in run(scheduler)]
    unread.outputs.max_unread = 1
    for s in (other, later):
        scheduler.remove(s)
    run(scheduler)
    assert unread.status is Status.RUNNING


def test_prefill_beside_decoding_is_limited() -> None:
    scheduler = Scheduler(PagePool(64), n_batch=512)
    a, b = sequence(10), sequence(300, first=100)
    scheduler.add(a)
    scheduler.schedule(max_prefill_tokens=4)
    assert [(w.sequence, w.n_tokens) for w in scheduler.schedule(max_prefill_tokens=4)] == [(a, 10)]  # nobody waits
    run(scheduler)
    scheduler.add(b)
    assert [(w.sequence, w.n_tokens) for w in scheduler.schedule(max_prefill_tokens=20)] == [(a, 1), (b, 20)]


def test_cached_prefix_is_not_computed_again() -> None:
    scheduler = Scheduler(PagePool(16), n_batch=512)
    first = sequence(3 * PAGE_TOKENS)
    scheduler.add(first)
    run(scheduler)
    scheduler.remove(first)
    again = sequence(3 * PAGE_TOKENS)
    scheduler.add(again)
    # The page of the last token is computed again, because its logits are needed.
    assert run(scheduler) == [(again, PAGE_TOKENS)]
    assert again.n_cached == 2 * PAGE_TOKENS


def test_long_rope_switch_recomputes_the_sequence() -> None:
    scheduler = Scheduler(PagePool(16), n_batch=512, n_ctx_orig=40)
    s = sequence(39)
    scheduler.add(s)
    assert run(scheduler) == [(s, 39)]
    assert run(scheduler) == [(s, 1)]
    assert s.long_rope is False
    assert len(s.tokens) == 41
    assert run(scheduler) == [(s, 41)]
    assert s.long_rope is True
    assert run(scheduler) == [(s, 1)]
    scheduler.remove(s)
    assert scheduler.n_available_pages == 16


def test_long_rope_switch_with_shared_pages_waits_for_room() -> None:
    """Of two sequences with a common prefix, the one that switches waits until pages of its own are available."""
    scheduler = Scheduler(PagePool(5), n_batch=512, n_ctx_orig=66)
    a = sequence(2 * PAGE_TOKENS + 1, 4)
    scheduler.add(a)
    run(scheduler)
    b = sequence(2 * PAGE_TOKENS + 1, 2)
    scheduler.add(b)
    run(scheduler)
    assert b.n_cached == 2 * PAGE_TOKENS
    run(scheduler)
    for _ in range(3):
        run(scheduler)
        if len(b.tokens) - b.n_prompt >= 2:
            scheduler.remove(b)
    assert a.long_rope is True
    scheduler.remove(a)
    scheduler.remove(b)
    assert scheduler.n_available_pages == 5


def test_hidden_state_request_outputs_from_its_first_position() -> None:
    scheduler = Scheduler(PagePool(16), n_batch=20)
    s = Sequence(list(range(45)), output_from=30)
    scheduler.add(s)
    rows = []
    for _ in range(3):
        (w,) = scheduler.schedule()
        assert not w.wants_logits
        rows.append((w.n_tokens, w.n_output_rows))
        scheduler.commit(w)
    assert rows == [(20, 0), (20, 10), (5, 5)]
    assert scheduler.schedule() == []
    scheduler.remove(s)
    # Only positions before output_from may come from the cache, in whole pages.
    for output_from, n_cached in ((40, PAGE_TOKENS), (PAGE_TOKENS, PAGE_TOKENS), (PAGE_TOKENS - 1, 0), (0, 0)):
        again = Sequence(list(range(45)), output_from=output_from)
        scheduler.add(again)
        scheduler.schedule()
        assert again.n_cached == n_cached
        scheduler.remove(again)


def test_generation_request_outputs_one_row() -> None:
    scheduler = Scheduler(PagePool(16), n_batch=20)
    scheduler.add(sequence(25))
    found = []
    for _ in range(2):
        (w,) = scheduler.schedule()
        found.append((w.n_tokens, w.n_output_rows, w.wants_logits))
        scheduler.commit(w)
    assert found == [(20, 0, False), (5, 1, True)]


def test_sequence_longer_than_the_pool_with_a_window() -> None:
    pool = PagePool(4)  # a window of 64 positions at any alignment, and one step
    scheduler = Scheduler(pool, n_batch=20, window=64)
    s = sequence(1000, 100)
    scheduler.add(s)
    while len(s.tokens) - s.n_prompt < 100:
        run(scheduler)
        assert pool.n_free_pages == 4 - len(s.pages) + s.n_freed
    assert s.n_freed == (1099 + 1 - 64) // PAGE_TOKENS
    assert set(s.pages[: s.n_freed]) == {FREED}
    scheduler.remove(s)
    assert scheduler.n_available_pages == 4


def test_concurrent_long_sequences_with_a_window() -> None:
    """A sequence needs the pages of its window, not those of its whole length."""
    scheduler = Scheduler(PagePool(8), n_batch=20, window=64)
    sequences = [sequence(1000, first=first) for first in (0, 2000, 4000)]
    for s in sequences:
        scheduler.add(s)
    for _ in range(200):
        run(scheduler)
        assert scheduler.running == sequences[:2]
    assert scheduler.n_available_pages == 0


def shared_prefix(n_pages: int, max_tokens: int) -> tuple[Scheduler, Sequence, Sequence]:
    """Start two sequences with a common prefix of two pages, in a pool of n_pages with a window.

    The first may generate 200 tokens, the second max_tokens.
    """
    window = 2 * PAGE_TOKENS + 1  # at most three pages with steps of one token
    scheduler = Scheduler(PagePool(n_pages), n_batch=1, window=window)
    first, second = sequence(2 * PAGE_TOKENS + 1, 200), sequence(2 * PAGE_TOKENS + 1, max_tokens)
    scheduler.add(first)
    run_until(scheduler, first, 1)
    scheduler.add(second)
    run(scheduler)
    return scheduler, first, second


@pytest.mark.parametrize("n_pages", [3, 4, 5, 6])
def test_sequences_whose_windows_leave_a_common_prefix(n_pages: int) -> None:
    """Each may need all its pages for itself."""
    scheduler, a, b = shared_prefix(n_pages, 150)
    for s in (a, b):
        run_until(scheduler, s, s.max_tokens)
        scheduler.remove(s)
    assert n_pages < 5 or b.n_cached == 2 * PAGE_TOKENS
    assert scheduler.n_available_pages == n_pages


@pytest.mark.parametrize("n_pages", [3, 4, 5, 6])
def test_sequence_whose_window_leaves_a_prefix_that_another_one_holds(n_pages: int) -> None:
    scheduler, long, short = shared_prefix(n_pages, 3)
    run_until(scheduler, long, 200)  # the batch has room for one token, so the other sequence waits
    scheduler.remove(long)
    run(scheduler)
    assert n_pages < 5 or short.n_cached == 2 * PAGE_TOKENS
    scheduler.remove(short)
    assert scheduler.n_available_pages == n_pages


def test_next_turn_needs_the_cached_pages_of_its_window_only() -> None:
    pool = PagePool(5)
    scheduler = Scheduler(pool, n_batch=32, window=64)
    first = sequence(20 * PAGE_TOKENS + 5, 1)
    scheduler.add(first)
    run_until(scheduler, first, 1)
    scheduler.remove(first)
    again = sequence(20 * PAGE_TOKENS + 40, 1)
    scheduler.add(again)
    assert run(scheduler) == [(again, 32)]
    assert again.n_cached == 20 * PAGE_TOKENS
    assert again.pages[:18] == [FREED] * 18
    scheduler.remove(again)
    # An edited turn whose window is freed is computed from the beginning.
    edited = sequence(10 * PAGE_TOKENS + 3, 1)
    scheduler.add(edited)
    run(scheduler)
    assert edited.n_cached == 0
    scheduler.remove(edited)
    assert scheduler.n_available_pages == 5


class FailingConnector:
    """A KVConnector that contains keys but cannot fetch their pages."""

    def __init__(self, keys: list[bytes]) -> None:
        self.keys = set(keys)

    def refresh(self) -> None:
        pass

    def __contains__(self, key: bytes) -> bool:
        return key in self.keys

    def fetch(self, pages: Mapping[bytes, int]) -> bool:
        self.keys -= set(pages)
        return False


def test_page_that_cannot_be_fetched_is_computed() -> None:
    s = sequence(3 * PAGE_TOKENS + 2)
    keys: list[bytes] = []
    extend_keys(keys, s.tokens, long_rope=False)
    scheduler = Scheduler(PagePool(6), n_batch=512, kv_connector=FailingConnector(keys[:2]))
    scheduler.add(s)
    assert run(scheduler) == [(s, 3 * PAGE_TOKENS + 2)]
    assert s.n_cached == 0
    scheduler.remove(s)
    assert scheduler.n_available_pages == 6


def test_pages_for() -> None:
    assert [pages_for(n) for n in (0, 1, PAGE_TOKENS, PAGE_TOKENS + 1)] == [0, 1, 1, 2]
