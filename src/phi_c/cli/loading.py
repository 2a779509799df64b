"""Loads the model for a verb, saying what it waits for on a terminal."""

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from phi_c.cli.options import given

if TYPE_CHECKING:
    from phi_c.llm import LLM

_NOTICE_SECONDS = 1.0
_NOTICE_KV_BYTES = 1 << 30


def load(model: str, **options: Any) -> "LLM":
    """Return the model; on a terminal, downloads show a bar and a slow load leaves a line on stderr."""
    from phi_c import llm  # noqa: PLC0415 - numpy and tokenizers, which `--help` does without

    is_terminal = sys.stderr.isatty()
    start = time.perf_counter()
    loaded = llm.load(model, progress=is_terminal, **given(options))
    if is_terminal and (seconds := time.perf_counter() - start) > _NOTICE_SECONDS:
        click.echo(f"loaded {loaded.config.name} in {seconds:.1f} s", err=True)
    if is_terminal and loaded.packed_cache is not None:
        click.echo(f"packed weights for the next start are kept in {loaded.packed_cache}", err=True)
    if is_terminal and loaded.kv_bytes >= _NOTICE_KV_BYTES:
        click.echo(kv_notice(loaded), err=True)
    return loaded


def kv_notice(loaded: "LLM") -> str:
    """Return a line on the memory that the KV cache will take: it is taken as a text grows, so none is yet."""
    from phi_c._core import KV_TYPES, PAGE_TOKENS, kv_page_bytes  # noqa: PLC0415

    kv = loaded.engine.kv
    gib = {name: kv.n_pages * kv_page_bytes(loaded.config, name) / 2**30 for name in KV_TYPES}
    others = ", ".join(f"{gib[name]:.1f} with --kv-type {name}" for name in KV_TYPES if name != loaded.kv_type)
    return (
        f"the keys and values of {kv.n_pages * PAGE_TOKENS} tokens take up to {gib[loaded.kv_type]:.1f} GiB ({others})"
    )
