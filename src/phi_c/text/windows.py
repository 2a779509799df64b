"""How a long text is cut into windows, each a text of its own for the model."""

from dataclasses import dataclass

from phi_c.errors import OptionError
from phi_c.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """Token ids, and the index of the first of them that counts; those before are context."""

    tokens: list[int]
    first: int

    @property
    def n_scored(self) -> int:
        """How many tokens count."""
        return len(self.tokens) - self.first


def disjoint(
    tokenizer: Tokenizer, ids: list[int], n_ctx: int, n_windows: int | None = None, first_window: int = 0
) -> list[Window]:
    """Return whole windows, one after the other; as in llama.cpp's perplexity the second half of each counts.

    Where texts of the model begin with BOS, it takes the place of each window's first token. What is left at the end
    is too short and not taken. first_window: windows that are left out; n_windows: at most. Raises OptionError when
    the text does not fill one.
    """
    n_needed = (first_window + 1) * n_ctx
    if len(ids) < n_needed:
        raise OptionError(
            f"the text has {len(ids)} tokens, expected at least {n_needed}: "
            f"{first_window + 1} window{'s' if first_window else ''} of {n_ctx}"
        )
    bos = tokenizer.with_bos([])
    starts = range(first_window * n_ctx, len(ids) - n_ctx + 1, n_ctx)[:n_windows]
    return [Window(bos + ids[start + len(bos) : start + n_ctx], n_ctx // 2 + 1) for start in starts]


def strided(ids: list[int], n_ctx: int, stride: int, n_windows: int | None = None) -> list[Window]:
    """Return windows that begin at every multiple of stride, of which the tokens count that none before had.

    As transformers' guide to perplexity: every token but the first counts once, the last window may be shorter.
    n_windows: at most. Raises OptionError for less than two tokens.
    """
    if len(ids) < 2:
        raise OptionError(f"the text has {len(ids)} tokens, expected at least 2")
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
