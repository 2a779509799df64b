"""Pages of the KV cache: who holds them, and which prefix each full one contains."""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence

from phi_c._core import PAGE_TOKENS

FREED = -1  # in a sequence's table of pages: nothing is there that a later token sees


def extend_keys(keys: list[bytes], tokens: Sequence[int], long_rope: bool) -> None:
    """Append the keys of the pages that tokens fill, after those that are there already.

    A page's key is a SHA-256 of the key before it, of its own tokens, and of the rotation: of the whole prefix, which
    decides what a page holds even where the page before it is no longer there.
    """
    for start in range(len(keys) * PAGE_TOKENS, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        before = keys[-1] if keys else bytes([long_rope])
        keys.append(hashlib.sha256(before + _PAGE.pack(*tokens[start : start + PAGE_TOKENS])).digest())


_PAGE = struct.Struct(f"<{PAGE_TOKENS}i")


def first_needed(position: int, window: int | None) -> int:
    """Return the index of the first page that a token at a position, or any later one, sees."""
    return 0 if window is None else max(position + 1 - window, 0) // PAGE_TOKENS


def usable(keys: Sequence[bytes], window: int | None, is_known: Callable[[bytes], bool]) -> range:
    """Return which of a prefix's pages are needed to go on after the longest part of it that can be gone on from.

    The range's stop is that part's length in pages. Without a window a part needs all its pages, with one those that
    the next token sees: earlier ones may be gone.
    """
    best = range(0)
    run = 0  # known pages in a row up to this one
    for n, key in enumerate(keys, 1):
        run = run + 1 if is_known(key) else 0
        first = first_needed(n * PAGE_TOKENS, window)
        if run >= n - first:
            best = range(first, n)
        elif window is None:
            break
    return best


class PagePool:
    """Counts who uses each page. Full pages stay findable after their last user, until room is needed."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._users = [0] * n_pages
        self._blank = list(range(n_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # full, without users, the longest unused first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def n_free_pages(self) -> int:
        """Pages that `take` can give."""
        return len(self._blank) + len(self._idle)

    def ref_count(self, page: int) -> int:
        """Return how many hold a page."""
        return self._users[page]

    def allocate(self) -> int:
        """Return a page for new content, forgetting what was longest unused if need be; it has one user."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self._users[page] = 1
        return page

    def incref(self, page: int) -> None:
        """Add a user to a page that `find` gave."""
        if self._users[page] == 0:
            del self._idle[page]
        self._users[page] += 1

    def decref(self, page: int) -> None:
        """Take a user away."""
        self._users[page] -= 1
        if self._users[page] == 0:
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def find(self, key: bytes) -> int | None:
        """Return the page that holds the end of the prefix that a key stands for, or None."""
        return self._page_of.get(key)

    def register(self, page: int, key: bytes) -> None:
        """Make a page in use, now full of computed tokens, findable; the first one of a key is."""
        if page not in self._key_of and key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def registered_keys(self) -> list[bytes]:
        """Return the keys that can be found, the longest unused first; of those in use, ends before beginnings."""
        in_use = [key for page, key in reversed(self._key_of.items()) if self._users[page]]
        return [*(self._key_of[page] for page in self._idle), *in_use]
