"""Progress on stderr, for verbs that take longer. Without a terminal nothing is shown."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Protocol


class ShowProgress(Protocol):
    """Shows how many windows of the total are done, and optionally a new description."""

    def __call__(self, done: int, total: int, description: str = "") -> None: ...


@contextlib.contextmanager
def window_bar(description: str) -> Iterator[ShowProgress]:
    """Yield a function that updates a progress bar of windows."""
    if not sys.stderr.isatty():
        yield lambda done, total, description="": None
        return
    from rich.console import Console  # noqa: PLC0415 - a tenth of a second
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bars:
        task = bars.add_task(description, total=None)

        def show(done: int, total: int, description: str = "") -> None:
            bars.update(task, completed=done, total=total, description=description or None)

        yield show


@contextlib.contextmanager
def byte_bar(description: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (bytes done, bytes in all) that updates a progress bar, unless quiet.

    The bar appears at the first call, so that the bars of a download can come before it.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bars.add_task(description, total=total)
            bars.update(task, completed=done)

        yield show


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows one line of status with a spinner; the line disappears at the end."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console  # noqa: PLC0415

    with Console(stderr=True, highlight=False).status("starting") as line:
        yield line.update
