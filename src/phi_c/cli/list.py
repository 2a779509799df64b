"""`phi-c list`: presets, and what is in the caches."""

import json

import click

_EPILOG = """\b
Examples:
  phi-c list
  phi-c list --json
"""


@click.command("list", epilog=_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """List the presets and the models in the caches."""
    from phi_c import hub  # noqa: PLC0415 - `--help` does without

    models = hub.cached()
    if as_json:
        presets = [{"name": p.name, "source": p.source, "about": p.about} for p in hub.PRESETS.values()]
        held = [{"name": m.name, "source": m.source, "path": str(m.path), "n_bytes": m.n_bytes} for m in models]
        click.echo(json.dumps({"presets": presets, "cached": held}, indent=2))
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.filesize import decimal  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    sizes = {model.name: model.n_bytes for model in models}
    table = Table("preset", "about", "downloaded", box=None, header_style="bold")
    for preset in hub.PRESETS.values():
        table.add_row(preset.name, preset.about, decimal(sizes[preset.name]) if preset.name in sizes else "")
    console = Console(highlight=False)
    console.print(table)
    others = [model for model in models if model.name not in hub.PRESETS]
    for model in others:
        console.print(f"{model.source}  {decimal(model.n_bytes)}", soft_wrap=True)
