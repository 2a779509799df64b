"""Splits a long text into windows that are evaluated independently: for perplexity, KL divergence, calibration."""

from dataclasses import dataclass

from phi_c.errors import OptionError
from phi_c.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """A window of token ids. Its first n_context tokens are context only, the others are scored."""

    tokens: list[int]
    n_context: int

    @property
    def n_scored(self) -> int:
        """Number of scored tokens."""
        return len(self.tokens) - self.n_context


def disjoint(
    tokenizer: Tokenizer, ids: list[int], n_ctx: int, n_windows: int | None = None, first_window: int = 0
) -> list[Window]:
    """Split into adjacent windows of n_ctx tokens and score the second half of each, as llama.cpp's perplexity does.

    If the model uses BOS, it replaces the first token of each window. A shorter remainder at the end is dropped.

    n_windows: maximum number of windows; None: all.
    first_window: number of windows to skip.

    Raises OptionError if the text is too short for one window.
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
    """Split into windows of n_ctx tokens that begin `stride` tokens apart; each scores the tokens no earlier one did.

    Every token but the first is scored at most once, and the last window may be shorter: as in transformers' guide to
    perplexity.

    n_windows: maximum number of windows; None: all.

    Raises OptionError for fewer than two tokens.
    """
    if len(ids) < 2:
        raise OptionError(f"the text has {len(ids)} tokens, expected at least 2")
    windows = []
    end = 0  # of the previous window
    for start in range(0, len(ids), stride):
        if end == len(ids):
            break
        previous_end, end = end, min(start + n_ctx, len(ids))
        # The first token of a window has no context, so it is not scored.
        n_context = max(previous_end - start, 1)
        if end - start > n_context:
            windows.append(Window(ids[start:end], n_context))
    return windows[:n_windows]
