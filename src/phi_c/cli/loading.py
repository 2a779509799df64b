"""Loads the model of a verb; on a terminal, reports what takes time, disk or memory."""

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from phi_c.cli.options import specified

if TYPE_CHECKING:
    from phi_c.llm import LLM

_NOTICE_SECONDS = 1.0
_NOTICE_KV_BYTES = 1 << 30


def load(model: str, **options: Any) -> "LLM":
    """Return the model; on a terminal, downloads show a bar and a slow load prints a line on stderr."""
    from phi_c import llm  # noqa: PLC0415 - imports numpy and tokenizers, which `--help` does not need

    is_terminal = sys.stderr.isatty()
    start = time.perf_counter()
    loaded = llm.load(model, progress=is_terminal, **specified(options))
    if is_terminal and (seconds := time.perf_counter() - start) > _NOTICE_SECONDS:
        click.echo(f"loaded {loaded.config.name} in {seconds:.1f} s", err=True)
    if is_terminal and loaded.packed_cache is not None:
        click.echo(f"saved packed weights for the next start in {loaded.packed_cache}", err=True)
    if is_terminal and _context_bytes(loaded, loaded.kv_type) >= _NOTICE_KV_BYTES:
        click.echo(kv_notice(loaded), err=True)
    return loaded


def kv_notice(loaded: "LLM") -> str:
    """Return a line on the KV cache memory of a whole context; it is allocated as sequences grow."""
    from phi_c._core import KV_TYPES  # noqa: PLC0415

    gib = {name: _context_bytes(loaded, name) / 2**30 for name in KV_TYPES}
    others = ", ".join(f"{gib[name]:.1f} GiB with --kv-type {name}" for name in KV_TYPES if name != loaded.kv_type)
    return f"KV cache: up to {gib[loaded.kv_type]:.1f} GiB for {loaded.n_ctx} tokens ({others})"


def _context_bytes(loaded: "LLM", kv_type: str) -> int:
    from phi_c._core import PAGE_TOKENS, kv_page_bytes  # noqa: PLC0415

    return -(-loaded.n_ctx // PAGE_TOKENS) * kv_page_bytes(loaded.config, kv_type)
