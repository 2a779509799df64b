"""KV cache pages: reference counts, and the prefix that each full page ends."""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence

from phi_c._core import PAGE_TOKENS

FREED = -1  # in a page table: the page is behind the sliding window and was freed

_PAGE = struct.Struct(f"<{PAGE_TOKENS}i")


def extend_keys(keys: list[bytes], tokens: Sequence[int], long_rope: bool) -> None:
    """Append the keys of the full pages of tokens that `keys` does not have yet.

    A page's key is a SHA-256 of the previous page's key, its own tokens and the LongRoPE factors. It identifies the
    whole prefix, which the page's content depends on, even if the pages before it are gone.
    """
    for start in range(len(keys) * PAGE_TOKENS, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        previous = keys[-1] if keys else bytes([long_rope])
        keys.append(hashlib.sha256(previous + _PAGE.pack(*tokens[start : start + PAGE_TOKENS])).digest())


def prefix_keys(tokens: Sequence[int], *, long_rope: bool) -> list[bytes]:
    """Return the keys of the full pages of tokens."""
    keys: list[bytes] = []
    extend_keys(keys, tokens, long_rope)
    return keys


def first_needed(position: int, window: int | None) -> int:
    """Return the index of the first page that a token at `position`, or a later one, attends to."""
    return 0 if window is None else max(position + 1 - window, 0) // PAGE_TOKENS


def usable_prefix(keys: Sequence[bytes], window: int | None, is_cached: Callable[[bytes], bool]) -> range:
    """Return the indices of the pages to load for the longest prefix that a sequence can continue from.

    The range's stop is the length of that prefix in pages. Without a window all its pages must be cached; with one,
    only those that the next token attends to, so the range may start after 0.
    """
    best = range(0)
    run = 0  # consecutive cached pages up to this one
    for n, key in enumerate(keys, 1):
        run = run + 1 if is_cached(key) else 0
        first = first_needed(n * PAGE_TOKENS, window)
        if run >= n - first:
            best = range(first, n)
        elif window is None:
            break
    return best


class PagePool:
    """Reference counts of all pages. A registered page without references stays findable until it is evicted (LRU)."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._ref_counts = [0] * n_pages
        self._blank = list(range(n_pages - 1, -1, -1))  # not referenced, not registered
        self._evictable: OrderedDict[int, None] = OrderedDict()  # not referenced, registered; least recently used first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def n_free_pages(self) -> int:
        """Pages without references, which `allocate` can return."""
        return len(self._blank) + len(self._evictable)

    def ref_count(self, page: int) -> int:
        """Return the number of references to a page."""
        return self._ref_counts[page]

    def allocate(self) -> int:
        """Return a page for new content, with one reference; evicts the least recently used page if necessary."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._evictable.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self._ref_counts[page] = 1
        return page

    def incref(self, page: int) -> None:
        """Add a reference to a page that is referenced or that `find` returned."""
        if self._ref_counts[page] == 0:
            del self._evictable[page]
        self._ref_counts[page] += 1

    def decref(self, page: int) -> None:
        """Remove a reference; without references a page is free."""
        self._ref_counts[page] -= 1
        if self._ref_counts[page] == 0:
            if page in self._key_of:
                self._evictable[page] = None
            else:
                self._blank.append(page)

    def find(self, key: bytes) -> int | None:
        """Return the page registered under a key, or None."""
        return self._page_of.get(key)

    def register(self, page: int, key: bytes) -> None:
        """Make a referenced page, full of computed tokens, findable; no effect if its key is registered already."""
        if page not in self._key_of and key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def registered_keys(self) -> list[bytes]:
        """Return all registered keys, least recently used first; of referenced pages, the end of a prefix first."""
        in_use = [key for page, key in reversed(self._key_of.items()) if self._ref_counts[page]]
        return [*(self._key_of[page] for page in self._evictable), *in_use]
