"""Loads the model for a verb, saying what it waits for on a terminal."""

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from phi_c.cli.options import given

if TYPE_CHECKING:
    from phi_c.llm import LLM

_NOTICE_SECONDS = 1.0


def load(model: str, **options: Any) -> "LLM":
    """Return the model; on a terminal, downloads show a bar and a slow load leaves a line on stderr."""
    from phi_c import llm  # noqa: PLC0415 - numpy and tokenizers, which `--help` does without

    is_terminal = sys.stderr.isatty()
    start = time.perf_counter()
    loaded = llm.load(model, progress=is_terminal, **given(options))
    if is_terminal and (seconds := time.perf_counter() - start) > _NOTICE_SECONDS:
        click.echo(f"loaded {loaded.config.name} in {seconds:.1f} s", err=True)
    if is_terminal and loaded.side_file is not None:
        click.echo(f"packed weights for the next start are kept in {loaded.side_file}", err=True)
    return loaded
