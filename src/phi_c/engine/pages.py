"""Pages of the KV cache: who holds them, and which prefix each full one contains."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

from phi_c._core import PAGE_TOKENS

# A full page is known by the page before it, its own tokens and the rotation: by the whole prefix, exactly.
Key: TypeAlias = tuple[int, bool, tuple[int, ...]]
_ROOT = -1


class PagePool:
    """Counts who uses each page. Full pages stay findable after their last user, until room is needed."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._users = [0] * n_pages
        self._blank = list(range(n_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # full, without users, the longest unused first
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._children: dict[int, set[int]] = {}  # known pages that continue a known page

    @property
    def n_free(self) -> int:
        """Pages that `take` can give."""
        return len(self._blank) + len(self._idle)

    def take(self) -> int:
        """Return a page for new content, forgetting the prefix longest unused if need be; it has one user."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add a user to a page that `find` gave."""
        if self._users[page] == 0:
            del self._idle[page]
        self._users[page] += 1

    def release(self, page: int) -> None:
        """Take a user away."""
        self._users[page] -= 1
        if self._users[page] == 0:
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def find(self, tokens: Sequence[int], long_rope: bool) -> list[int]:
        """Return the pages that hold the longest known prefix of tokens, whole pages only."""
        pages: list[int] = []
        for start in range(0, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
            before = pages[-1] if pages else _ROOT
            page = self._page_of.get((before, long_rope, tuple(tokens[start : start + PAGE_TOKENS])))
            if page is None:
                break
            pages.append(page)
        return pages

    def remember(self, pages: Sequence[int], index: int, tokens: Sequence[int], long_rope: bool) -> None:
        """Make page number `index` of a sequence, now full of computed tokens, findable."""
        page, before = pages[index], pages[index - 1] if index else _ROOT
        key = (before, long_rope, tuple(tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]))
        # Two sequences may compute the same page; a page whose predecessor is not known itself cannot be found.
        if page in self._key_of or key in self._page_of or (index and before not in self._key_of):
            return
        self._page_of[key] = page
        self._key_of[page] = key
        self._children.setdefault(before, set()).add(page)

    def _forget(self, page: int) -> None:
        """Forget a page and all that continue it: their keys name a page whose content changes."""
        self._children[self._key_of[page][0]].discard(page)
        forgotten = [page]
        while forgotten:
            known = forgotten.pop()
            del self._page_of[self._key_of.pop(known)]
            forgotten.extend(self._children.pop(known, ()))
            if known in self._idle:
                del self._idle[known]
                self._blank.append(known)
