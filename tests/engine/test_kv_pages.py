"""Pages: counted, shared by prefix, and never under two meanings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi_c._core import PAGE_TOKENS
from phi_c.engine.kv_pages import PagePool, extend_keys, first_needed, usable_prefix


def keys_of(tokens: list[int], long_rope: bool = False) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, long_rope)
    return keys


def fill(pool: PagePool, tokens: list[int], long_rope: bool = False) -> list[int]:
    """Take pages for tokens and make the full ones findable."""
    pages = [pool.allocate() for _ in range(-(-len(tokens) // PAGE_TOKENS))]
    for page, key in zip(pages, keys_of(tokens, long_rope), strict=False):
        pool.register(page, key)
    return pages


def find(pool: PagePool, tokens: list[int], long_rope: bool = False, window: int | None = None) -> list[int | None]:
    keys = keys_of(tokens, long_rope)
    return [pool.find(keys[i]) for i in usable_prefix(keys, window, lambda key: pool.find(key) is not None)]


def decref(pool: PagePool, pages: list[int]) -> None:
    for page in reversed(pages):
        pool.decref(page)


def test_keys_stand_for_the_whole_prefix() -> None:
    tokens = list(range(3 * PAGE_TOKENS + 5))
    keys = keys_of(tokens)
    assert len(set(keys)) == len(keys) == 3
    grown = keys_of(tokens[: PAGE_TOKENS + 3])
    extend_keys(grown, tokens, False)
    assert grown == keys
    assert keys_of(tokens[: 2 * PAGE_TOKENS]) == keys[:2]
    assert set(keys_of([1, *tokens[1:]])).isdisjoint(keys)
    assert set(keys_of(tokens, True)).isdisjoint(keys)
    assert keys_of(tokens[PAGE_TOKENS:])[0] != keys[1]
    # The same on every machine: they name files.
    assert keys[0].hex().startswith(KEY_OF_0_TO_31)


KEY_OF_0_TO_31 = "b05aac17dcb5a141"


def test_a_prefix_is_found_whole_pages_at_a_time() -> None:
    pool = PagePool(8)
    tokens = list(range(3 * PAGE_TOKENS + 5))
    pages = fill(pool, tokens)
    assert find(pool, tokens) == pages[:3]
    assert find(pool, tokens[: 2 * PAGE_TOKENS + 31]) == pages[:2]
    assert find(pool, [*tokens[:PAGE_TOKENS], 0, *tokens[PAGE_TOKENS + 1 :]]) == pages[:1]
    assert find(pool, tokens, True) == []
    decref(pool, pages)
    assert pool.n_free_pages == 8
    assert find(pool, tokens) == pages[:3]


def test_the_longest_unused_goes_first() -> None:
    pool = PagePool(4)
    old, new = list(range(2 * PAGE_TOKENS)), list(range(1000, 1000 + 2 * PAGE_TOKENS))
    decref(pool, fill(pool, old))
    decref(pool, fill(pool, new))
    assert pool.registered_keys() == [*reversed(keys_of(old)), *reversed(keys_of(new))]
    pool.allocate()
    assert len(find(pool, old)) == 1
    assert len(find(pool, new)) == 2
    pool.allocate()
    assert find(pool, old) == []


def test_what_is_used_again_goes_later() -> None:
    pool = PagePool(3)
    old, new = list(range(PAGE_TOKENS)), list(range(1000, 1000 + PAGE_TOKENS))
    pages = fill(pool, old)
    decref(pool, pages)
    decref(pool, fill(pool, new))
    pool.incref(pages[0])
    assert pool.registered_keys() == [*keys_of(new), *keys_of(old)]
    pool.decref(pages[0])
    pool.allocate()
    pool.allocate()
    assert find(pool, old) == pages
    assert find(pool, new) == []


def test_pages_in_use_are_not_taken() -> None:
    pool = PagePool(3)
    tokens = list(range(PAGE_TOKENS))
    pages = fill(pool, tokens)
    assert pool.n_free_pages == 2
    pool.allocate()
    pool.allocate()
    assert pool.n_free_pages == 0
    assert find(pool, tokens) == pages


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 34, 63, 64, 65, 100])
@pytest.mark.parametrize("position", [0, 1, 31, 32, 33, 64, 127, 128, 129, 1000])
def test_first_needed(window: int, position: int) -> None:
    seen = [p for p in range(position + 1) if position - p < window]
    assert first_needed(position, window) == seen[0] // PAGE_TOKENS
    assert first_needed(position, None) == 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.booleans(), max_size=12), st.none() | st.integers(1, 200))
def test_usable_is_the_longest_part_whose_needed_pages_are_there(known: list[bool], window: int | None) -> None:
    keys = [bytes([i]) for i in range(len(known))]
    span = usable_prefix(keys, window, lambda key: known[key[0]])
    lengths = [
        n
        for n in range(len(known) + 1)
        if all(
            known[p // PAGE_TOKENS] for p in range(n * PAGE_TOKENS) if window is None or n * PAGE_TOKENS - p < window
        )
    ]
    assert span.stop == max(lengths)
    if len(span):
        assert span.start == first_needed(span.stop * PAGE_TOKENS, window)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_found_holds_what_was_computed(data: st.DataObject) -> None:
    """Texts over two letters come and go; each page remembers what was written into it."""
    pool = PagePool(6)
    content: dict[int, tuple[int, ...]] = {}
    held: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            decref(pool, held.pop(data.draw(st.integers(0, len(held) - 1))))
            continue
        letters = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))
        tokens = [letter for letter in letters for _ in range(PAGE_TOKENS)]
        keys = keys_of(tokens)
        pages = [page for page in find(pool, tokens) if page is not None]
        for page in pages:
            pool.incref(page)
        if pool.n_free_pages < len(letters) - len(pages):
            decref(pool, pages)
            continue
        for i in range(len(letters)):
            prefix = tuple(letters[: i + 1])
            if i < len(pages):
                assert content[pages[i]] == prefix
            else:
                pages.append(pool.allocate())
                content[pages[i]] = prefix
                pool.register(pages[i], keys[i])
        held.append(pages)
        in_use = {page for pages in held for page in pages}
        assert pool.n_free_pages == 6 - len(in_use)
        assert len(pool.registered_keys()) == len(set(pool.registered_keys()))
