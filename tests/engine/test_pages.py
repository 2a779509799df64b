"""Pages: counted, shared by prefix, and never under two meanings."""

from hypothesis import given, settings
from hypothesis import strategies as st

from phi_c._core import PAGE_TOKENS
from phi_c.engine.pages import PagePool


def fill(pool: PagePool, tokens: list[int], long_rope: bool = False) -> list[int]:
    """Take pages for tokens and make the full ones findable."""
    pages = [pool.take() for _ in range(-(-len(tokens) // PAGE_TOKENS))]
    for i in range(len(tokens) // PAGE_TOKENS):
        pool.remember(pages, i, tokens, long_rope)
    return pages


def release(pool: PagePool, pages: list[int]) -> None:
    for page in reversed(pages):
        pool.release(page)


def test_a_prefix_is_found_whole_pages_at_a_time() -> None:
    pool = PagePool(8)
    tokens = list(range(3 * PAGE_TOKENS + 5))
    pages = fill(pool, tokens)
    assert pool.find(tokens, False) == pages[:3]
    assert pool.find(tokens[: 2 * PAGE_TOKENS + 31], False) == pages[:2]
    assert pool.find([*tokens[:PAGE_TOKENS], 0, *tokens[PAGE_TOKENS + 1 :]], False) == pages[:1]
    assert pool.find(tokens, True) == []
    release(pool, pages)
    assert pool.n_free == 8
    assert pool.find(tokens, False) == pages[:3]


def test_the_longest_unused_goes_first_and_takes_its_continuation_along() -> None:
    pool = PagePool(4)
    old, new = list(range(2 * PAGE_TOKENS)), list(range(1000, 1000 + 2 * PAGE_TOKENS))
    release(pool, fill(pool, old))
    release(pool, fill(pool, new))
    pool.take()
    assert len(pool.find(old, False)) == 1
    assert len(pool.find(new, False)) == 2
    pool.take()
    assert pool.find(old, False) == []


def test_pages_in_use_are_not_taken() -> None:
    pool = PagePool(3)
    tokens = list(range(PAGE_TOKENS))
    pages = fill(pool, tokens)
    assert pool.n_free == 2
    pool.take()
    pool.take()
    assert pool.n_free == 0
    assert pool.find(tokens, False) == pages


def test_a_long_prefix_is_forgotten_without_recursion() -> None:
    pool = PagePool(5000)
    pages = fill(pool, list(range(5000 * PAGE_TOKENS)))
    pool.release(pages[0])  # the first goes before its continuation
    for page in pages[1:]:
        pool.release(page)
    pool.take()
    assert pool.n_free == 4999
    assert pool.find(list(range(PAGE_TOKENS)), False) == []


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_found_holds_what_was_computed(data: st.DataObject) -> None:
    """Texts over two letters come and go; each page remembers what was written into it."""
    pool = PagePool(6)
    content: dict[int, tuple[int, ...]] = {}
    held: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            release(pool, held.pop(data.draw(st.integers(0, len(held) - 1))))
            continue
        letters = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))
        tokens = [letter for letter in letters for _ in range(PAGE_TOKENS)]
        pages = pool.find(tokens, False)
        for page in pages:
            pool.share(page)
        if pool.n_free < len(letters) - len(pages):
            release(pool, pages)
            continue
        for i in range(len(letters)):
            prefix = tuple(letters[: i + 1])
            if i < len(pages):
                assert content[pages[i]] == prefix
            else:
                pages.append(pool.take())
                content[pages[i]] = prefix
                pool.remember(pages, i, tokens, False)
        held.append(pages)
        in_use = {page for pages in held for page in pages}
        assert pool.n_free == 6 - len(in_use)
