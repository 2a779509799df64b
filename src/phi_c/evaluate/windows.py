"""How a text is cut into windows, each a text of its own for the model."""

from dataclasses import dataclass

from phi_c.errors import OptionError
from phi_c.llm import LLM


@dataclass(frozen=True)
class Window:
    """Token ids, and the index of the first of them that counts; those before are context."""

    tokens: list[int]
    first: int

    @property
    def n_scored(self) -> int:
        """How many tokens count."""
        return len(self.tokens) - self.first


def disjoint(llm: LLM, ids: list[int], n_ctx: int, n_windows: int | None = None) -> list[Window]:
    """Return whole windows, one after the other, of whose tokens the second half counts, as llama.cpp's perplexity.

    Where texts of the model begin with BOS, it takes the place of each window's first token. Raises OptionError when
    the text does not fill a window.
    """
    if len(ids) < n_ctx:
        raise OptionError(
            f"the text has {len(ids)} tokens, expected at least {n_ctx}, a window: take a longer text, a smaller n_ctx"
            " or a stride"
        )
    bos = llm.tokenizer.with_bos([])
    starts = range(0, len(ids) - n_ctx + 1, n_ctx)[:n_windows]
    return [Window(bos + ids[start + len(bos) : start + n_ctx], n_ctx // 2 + 1) for start in starts]


def strided(ids: list[int], n_ctx: int, stride: int, n_windows: int | None = None) -> list[Window]:
    """Return windows that begin at every multiple of stride, of which the tokens count that none before had.

    As transformers' guide to perplexity: every token but the first counts once, the last window may be shorter.
    """
    windows = []
    end = 0
    for start in range(0, len(ids), stride):
        if end == len(ids):
            break
        before, end = end, min(start + n_ctx, len(ids))
        # What begins a window has no context in it; with a stride of n_ctx it is left out.
        first = max(before - start, 1)
        if end - start > first:
            windows.append(Window(ids[start:end], first))
    return windows[:n_windows]


def encode(llm: LLM, text: str) -> list[int]:
    """Return the ids of a text, after BOS if the model wants one; raises OptionError for less than two tokens."""
    ids = llm.tokenizer.encode(text)
    if len(ids) < 2:
        raise OptionError(f"the text has {len(ids)} tokens, expected at least 2")
    return ids


def check_n_ctx(llm: LLM, n_ctx: int) -> None:
    """Raise OptionError for windows that the context does not hold."""
    if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or not 2 <= n_ctx <= llm.n_ctx:
        raise OptionError(f"n_ctx of a window is {n_ctx!r}, expected 2 to {llm.n_ctx}, what the model was loaded with")
