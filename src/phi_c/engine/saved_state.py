"""Saved states: registered KV pages in a file, with which a later process continues without recomputing prefixes."""

from dataclasses import dataclass
from pathlib import Path

from phi_c._core import PAGE_TOKENS
from phi_c.engine.engine import Engine
from phi_c.engine.kv_pages import prefix_keys
from phi_c.engine.loop import EngineLoop
from phi_c.engine.page_file import Origin, PageFile, write_pages
from phi_c.storage import atomic_write


@dataclass(frozen=True)
class StateSummary:
    """Size of a saved state, and how much of it was loaded."""

    path: Path
    tokens: int  # in the file
    loaded_tokens: int  # now in the KV cache, fewer than `tokens` if it has less room; 0 after saving
    n_bytes: int  # size of the file


def save_state(loop: EngineLoop, origin: Origin, path: Path, tokens: list[int] | None = None) -> StateSummary:
    """Write all registered pages, or those of the prefix of `tokens`, to a file atomically.

    Pages are copied one by one while other calls run; a page evicted meanwhile is omitted. Raises OutputError,
    ModelClosedError.
    """
    keys = loop.call(Engine.registered_keys)
    if tokens is not None:
        wanted = {*prefix_keys(tokens, long_rope=False), *prefix_keys(tokens, long_rope=True)}
        keys = [key for key in keys if key in wanted]
    with atomic_write(path) as file:
        n_pages = write_pages(file, origin, keys, loop.page_bytes, loop.read_page)
    return StateSummary(path, n_pages * PAGE_TOKENS, 0, path.stat().st_size)


def load_state(loop: EngineLoop, origin: Origin, path: Path) -> StateSummary:
    """Register the pages of a file, the most recently used ones if there is no room for all.

    They evict the least recently used pages. Raises StateError for a corrupt file or another origin; each page is
    checked before it is registered, and pages before the corrupt one stay. Raises ModelClosedError.
    """
    with PageFile(path, origin, loop.page_bytes) as file:
        n_loaded = 0
        first = max(len(file.keys) - loop.call(lambda engine: engine.scheduler.n_available_pages), 0)
        for index in range(first, len(file.keys)):
            n_loaded += loop.insert_page(file.keys[index], file.page(index))
        return StateSummary(path, len(file.keys) * PAGE_TOKENS, n_loaded * PAGE_TOKENS, path.stat().st_size)
