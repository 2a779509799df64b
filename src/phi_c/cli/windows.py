"""What the verbs share that run a long text window by window: the text, a bar, figures."""

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from phi_c.errors import OptionError


class Show(Protocol):
    """Shows the windows done, of how many, and a figure so far."""

    def __call__(self, done: int, total: int, figure: str = "") -> None: ...


def read_text(name: str) -> str:
    """Return the text of a file, or of stdin for "-"; raises OptionError for what cannot be read or is not UTF-8."""
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise OptionError(f"{name} cannot be read: {error.strerror or error}") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "stdin" if name == "-" else name
        raise OptionError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from None


@contextlib.contextmanager
def bar(figure: str) -> Iterator[Show]:
    """Give a function that shows how far the work is: on a terminal as a bar on stderr. figure: what it begins with."""
    if not sys.stderr.isatty():
        yield lambda done, total, figure="": None
        return
    from rich.console import Console  # noqa: PLC0415 - a tenth of a second
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bars:
        task = bars.add_task(figure, total=None)

        def show(done: int, total: int, figure: str = "") -> None:
            bars.update(task, completed=done, total=total, description=figure or None)

        yield show


def plus_minus(value: float, error: float, form: str) -> str:
    """Return a figure and its error; the error of a single window is not known."""
    return f"{value:{form}}" if math.isnan(error) else f"{value:{form}} ± {error:{form}}"


def for_json(figures: dict[str, Any]) -> dict[str, Any]:
    """Return figures that JSON has words for: what is not known is null."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in figures.items()}
