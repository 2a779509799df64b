"""`phi-c list`: presets, downloaded models and caches with their sizes."""

import json

import click
import cloup

from phi_c.cli import options as opt

_EPILOG = """\b
Examples:
  phi-c list
  phi-c list --json
"""


@cloup.command("list", epilog=_EPILOG)
@cloup.option_group("Output options", opt.json_flag())
def command(as_json: bool) -> None:
    """List presets, downloaded models and caches, with their sizes on disk.

    `phi-c rm` removes them.
    """
    from phi_c import hub, removal  # noqa: PLC0415 - not needed for `--help`
    from phi_c.storage import cache_dir  # noqa: PLC0415

    models, cache_sizes = hub.cached(), removal.cache_sizes()
    if as_json:
        report = {
            "presets": [{"name": p.name, "source": p.source, "about": p.about} for p in hub.PRESETS.values()],
            "cached": [{"name": m.name, "source": m.source, "path": str(m.path), "n_bytes": m.n_bytes} for m in models],
            "caches": [
                {"name": name, "path": str(cache_dir() / name), "n_bytes": size} for name, size in cache_sizes.items()
            ],
        }
        click.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.filesize import decimal  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    console = Console(highlight=False)
    sizes = {model.name: model.n_bytes for model in models}
    presets = Table("preset", "about", "downloaded", box=None, header_style="bold")
    for preset in hub.PRESETS.values():
        presets.add_row(preset.name, preset.about, decimal(sizes[preset.name]) if preset.name in sizes else "")
    console.print(presets)
    others = [model for model in models if model.name not in hub.PRESETS]
    if others:
        console.print("\nother downloaded models", style="bold")
    for model in others:
        console.print(f"{model.source}  {decimal(model.n_bytes)}", soft_wrap=True, markup=False)
    console.print()
    caches = Table("cache", "about", "size", box=None, header_style="bold")
    for name, size in cache_sizes.items():
        caches.add_row(name, removal.CACHES[name], decimal(size))
    console.print(caches)
