"""Runs `phi-c doctor --tune`: measures, stores the profile and prints what changed."""

import contextlib
import json
import sys
from collections.abc import Iterator

import click

from phi_c import _core, hub, llm, machine
from phi_c.bench.tuning import Change, measure_settings, random_model
from phi_c.cli.progress import status_line
from phi_c.errors import CacheError, OptionError
from phi_c.model import tuning
from phi_c.params import check_count, choose_tier

_N_CTX = 512


def run_tuning(source: str | None, n_threads: int | None, tier: str | None, *, as_json: bool) -> None:
    """Measure a model (None: random weights), store the profile and print the settings before and after.

    Raises the errors of phi_c.load, OptionError for a tier without packed weights, and CacheError if the profile cannot
    be stored.
    """
    if source is not None:
        hub.resolve(source, progress=sys.stderr.isatty())  # a download shows its own bar
    with status_line() as show:
        show("loading")
        with _model(source, n_threads, tier) as model:
            if not model.packed_bytes:
                raise OptionError(f"tier is {model.tier!r}, expected one with packed weights: there is nothing to tune")
            key = tuning.key_of(model)
            profile = tuning.apply_stored(model)
            profile, changes = measure_settings(model, profile, lambda text: show(f"measuring {text}"))
    if not tuning.store(profile):
        raise CacheError(f"the profile cannot be stored in {key.path}: set PHI_C_CACHE to use another folder")
    if as_json:
        click.echo(json.dumps({"key": vars(key), "path": str(key.path), "changes": [vars(each) for each in changes]}))
    else:
        _print(key, changes)


@contextlib.contextmanager
def _model(source: str | None, n_threads: int | None, tier: str | None) -> Iterator[_core.Model]:
    check_count("n_threads", n_threads, 1, 1024)
    if source is None:
        model = random_model(n_threads or machine.default_threads(), choose_tier(tier))
        try:
            yield model
        finally:
            model.close()
    else:
        with llm.load(source, n_threads=n_threads, tier=tier, n_ctx=_N_CTX) as loaded:
            yield loaded.engine.model


def _print(key: tuning.Key, changes: list[Change]) -> None:
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    title = f"{key.cpu}, {key.n_threads} thread{'s' if key.n_threads > 1 else ''}, {key.tier}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("setting", "before", "now"):
        table.add_column(name)
    table.add_column("gain", justify="right")
    for each in changes:
        table.add_row(each.name, each.old, each.new, f"{each.gain - 1:+.1%}" if each.gain != 1 else "")
    console = Console(highlight=False)
    console.print(table)
    console.print("Gains of prefetch are over the default setting, other gains over the setting before.")
    console.print(f"Stored in {key.path}", soft_wrap=True)
