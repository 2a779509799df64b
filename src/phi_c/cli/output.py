"""Formatting that verbs share: numbers with errors, numbers in JSON, tables of names and values."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def plus_minus(value: float, error: float, form: str) -> str:
    """Return a value and its standard error; only the value if the error is NaN, as for a single window."""
    return f"{value:{form}}" if math.isnan(error) else f"{value:{form}} ± {error:{form}}"


def finite_or_null(figures: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in which NaN and infinity, which JSON lacks, are None."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in figures.items()}


def name_value_table(rows: Iterable[tuple[str, str]]) -> "Table":
    """Return a table of two columns without a header; values are plain text, without rich's markup."""
    from rich.table import Table  # noqa: PLC0415 - with the next: a tenth of a second
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table
