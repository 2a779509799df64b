"""The prefix cache in a file: what a later process needs to continue the same texts without computing them again."""

from dataclasses import dataclass
from pathlib import Path

from phi_c._core import PAGE_TOKENS
from phi_c.engine.engine import Engine
from phi_c.engine.kv_pages import extend_keys
from phi_c.engine.page_file import Origin, PageFile, write_pages
from phi_c.storage import atomic_write


@dataclass(frozen=True)
class StateSummary:
    """What a saved state holds, and how much of it a cache has taken."""

    path: Path
    tokens: int  # in the file
    loaded_tokens: int  # in the cache now: fewer where it has less room; 0 for a file just written
    n_bytes: int


def save_state(engine: Engine, origin: Origin, path: Path, tokens: list[int] | None = None) -> StateSummary:
    """Write the pages that can be found, or those of one text's prefix, to a file that appears whole.

    Pages are copied one by one, so other calls run meanwhile; one that they take for new content is left out. Raises
    OutputError, ModelClosedError.
    """
    keys = engine.known_keys() if tokens is None else _known_keys_of(engine, tokens)
    with atomic_write(path) as file:
        n_pages = write_pages(file, origin, keys, engine.kv.page_bytes, engine.read_page)
    return StateSummary(path, n_pages * PAGE_TOKENS, 0, path.stat().st_size)


def load_state(engine: Engine, origin: Origin, path: Path) -> StateSummary:
    """Make the pages of a file findable, those used last where there is no room for all.

    They take the place of what was unused longest. Raises StateError for a file that is damaged or of another origin:
    pages that came before the damage stay, for each is checked before it is taken. Raises ModelClosedError.
    """
    with PageFile(path, origin, engine.kv.page_bytes) as file:
        n_loaded = 0
        first = max(len(file.keys) - engine.n_pages_free, 0)
        for index in range(first, len(file.keys)):
            n_loaded += engine.insert_page(file.keys[index], file.page(index))
        return StateSummary(path, len(file.keys) * PAGE_TOKENS, n_loaded * PAGE_TOKENS, path.stat().st_size)


def _known_keys_of(engine: Engine, tokens: list[int]) -> list[bytes]:
    """Return the keys of a text's pages, whichever rotation they have, the longest unused first."""
    wanted = set()
    for long_rope in (False, True):
        keys: list[bytes] = []
        extend_keys(keys, tokens, long_rope)
        wanted.update(keys)
    return [key for key in engine.known_keys() if key in wanted]
