"""KV pages: reference counts, prefix keys, LRU eviction."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi_c._core import PAGE_TOKENS
from phi_c.engine.kv_pages import PagePool, extend_keys, first_needed, usable_prefix


def keys_for(tokens: list[int], long_rope: bool = False) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, long_rope)
    return keys


def allocate_filled(pool: PagePool, tokens: list[int], long_rope: bool = False) -> list[int]:
    """Allocate pages for tokens and register the full ones."""
    pages = [pool.allocate() for _ in range(-(-len(tokens) // PAGE_TOKENS))]
    for page, key in zip(pages, keys_for(tokens, long_rope), strict=False):
        pool.register(page, key)
    return pages


def find_prefix(
    pool: PagePool, tokens: list[int], long_rope: bool = False, window: int | None = None
) -> list[int | None]:
    keys = keys_for(tokens, long_rope)
    return [pool.find(keys[i]) for i in usable_prefix(keys, window, lambda key: pool.find(key) is not None)]


def decref_all(pool: PagePool, pages: list[int]) -> None:
    for page in reversed(pages):
        pool.decref(page)


def test_keys_depend_on_the_whole_prefix() -> None:
    tokens = list(range(3 * PAGE_TOKENS + 5))
    keys = keys_for(tokens)
    assert len(set(keys)) == len(keys) == 3
    grown = keys_for(tokens[: PAGE_TOKENS + 3])
    extend_keys(grown, tokens, False)
    assert grown == keys
    assert keys_for(tokens[: 2 * PAGE_TOKENS]) == keys[:2]
    assert set(keys_for([1, *tokens[1:]])).isdisjoint(keys)
    assert set(keys_for(tokens, True)).isdisjoint(keys)
    assert keys_for(tokens[PAGE_TOKENS:])[0] != keys[1]
    # The same on every machine, because the keys are stored in files.
    assert keys[0].hex().startswith(KEY_OF_0_TO_31)


KEY_OF_0_TO_31 = "b05aac17dcb5a141"


def test_prefix_is_found_in_whole_pages() -> None:
    pool = PagePool(8)
    tokens = list(range(3 * PAGE_TOKENS + 5))
    pages = allocate_filled(pool, tokens)
    assert find_prefix(pool, tokens) == pages[:3]
    assert find_prefix(pool, tokens[: 2 * PAGE_TOKENS + 31]) == pages[:2]
    assert find_prefix(pool, [*tokens[:PAGE_TOKENS], 0, *tokens[PAGE_TOKENS + 1 :]]) == pages[:1]
    assert find_prefix(pool, tokens, True) == []
    decref_all(pool, pages)
    assert pool.n_free_pages == 8
    assert find_prefix(pool, tokens) == pages[:3]


def test_least_recently_used_page_is_evicted_first() -> None:
    pool = PagePool(4)
    old, new = list(range(2 * PAGE_TOKENS)), list(range(1000, 1000 + 2 * PAGE_TOKENS))
    decref_all(pool, allocate_filled(pool, old))
    decref_all(pool, allocate_filled(pool, new))
    assert pool.registered_keys() == [*reversed(keys_for(old)), *reversed(keys_for(new))]
    pool.allocate()
    assert len(find_prefix(pool, old)) == 1
    assert len(find_prefix(pool, new)) == 2
    pool.allocate()
    assert find_prefix(pool, old) == []


def test_use_makes_a_page_most_recently_used() -> None:
    pool = PagePool(3)
    old, new = list(range(PAGE_TOKENS)), list(range(1000, 1000 + PAGE_TOKENS))
    pages = allocate_filled(pool, old)
    decref_all(pool, pages)
    decref_all(pool, allocate_filled(pool, new))
    pool.incref(pages[0])
    assert pool.registered_keys() == [*keys_for(new), *keys_for(old)]
    pool.decref(pages[0])
    pool.allocate()
    pool.allocate()
    assert find_prefix(pool, old) == pages
    assert find_prefix(pool, new) == []


def test_referenced_pages_are_not_evicted() -> None:
    pool = PagePool(3)
    tokens = list(range(PAGE_TOKENS))
    pages = allocate_filled(pool, tokens)
    assert pool.n_free_pages == 2
    pool.allocate()
    pool.allocate()
    assert pool.n_free_pages == 0
    assert find_prefix(pool, tokens) == pages


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 34, 63, 64, 65, 100])
@pytest.mark.parametrize("position", [0, 1, 31, 32, 33, 64, 127, 128, 129, 1000])
def test_first_needed(window: int, position: int) -> None:
    visible = [p for p in range(position + 1) if position - p < window]
    assert first_needed(position, window) == visible[0] // PAGE_TOKENS
    assert first_needed(position, None) == 0


@settings(max_examples=300)
@given(st.lists(st.booleans(), max_size=12), st.none() | st.integers(1, 200))
def test_usable_prefix_is_the_longest_one_whose_needed_pages_are_cached(
    is_cached: list[bool], window: int | None
) -> None:
    keys = [bytes([i]) for i in range(len(is_cached))]
    span = usable_prefix(keys, window, lambda key: is_cached[key[0]])
    lengths = [
        n
        for n in range(len(is_cached) + 1)
        if all(
            is_cached[p // PAGE_TOKENS]
            for p in range(n * PAGE_TOKENS)
            if window is None or n * PAGE_TOKENS - p < window
        )
    ]
    assert span.stop == max(lengths)
    if len(span):
        assert span.start == first_needed(span.stop * PAGE_TOKENS, window)


@settings(max_examples=100)
@given(st.data())
def test_found_pages_hold_the_content_of_their_key(data: st.DataObject) -> None:
    """Random sequences over two letters; `content` records the prefix that was written into each page."""
    pool = PagePool(6)
    content: dict[int, tuple[int, ...]] = {}
    referenced: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if referenced and data.draw(st.booleans()):
            decref_all(pool, referenced.pop(data.draw(st.integers(0, len(referenced) - 1))))
            continue
        letters = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))
        tokens = [letter for letter in letters for _ in range(PAGE_TOKENS)]
        keys = keys_for(tokens)
        pages = [page for page in find_prefix(pool, tokens) if page is not None]
        for page in pages:
            pool.incref(page)
        if pool.n_free_pages < len(letters) - len(pages):
            decref_all(pool, pages)
            continue
        for i in range(len(letters)):
            prefix = tuple(letters[: i + 1])
            if i < len(pages):
                assert content[pages[i]] == prefix
            else:
                pages.append(pool.allocate())
                content[pages[i]] = prefix
                pool.register(pages[i], keys[i])
        referenced.append(pages)
        in_use = {page for pages in referenced for page in pages}
        assert pool.n_free_pages == 6 - len(in_use)
        assert len(pool.registered_keys()) == len(set(pool.registered_keys()))
