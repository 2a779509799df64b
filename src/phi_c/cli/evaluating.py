"""What the verbs that measure quality share: the text, and a bar."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phi_c.errors import OptionError


def read_text(name: str) -> str:
    """Return the text of a file, or of stdin for "-"; raises OptionError for what is no UTF-8 text."""
    raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "stdin" if name == "-" else name
        raise OptionError(f"{where} is not UTF-8 text: byte {raw[error.start]:#04x} at {error.start}") from None


@contextlib.contextmanager
def bar() -> Iterator[Callable[[int, int, str], None]]:
    """Give a function that is told windows done, all windows and the figure so far: a bar on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield lambda done, total, figure: None
        return
    from rich.console import Console  # noqa: PLC0415 - for terminals
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bars:
        task = bars.add_task("reading the text", total=None)
        yield lambda done, total, figure: bars.update(task, completed=done, total=total, description=figure)


def plus_minus(value: float, error: float, form: str) -> str:
    """Return a figure and its error; the error of a single window is not known."""
    return f"{value:{form}}" if math.isnan(error) else f"{value:{form}} ± {error:{form}}"


def for_json(figures: dict[str, Any]) -> dict[str, Any]:
    """Return figures that JSON has words for: what is not known is null."""
    return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in figures.items()}
