"""`phi-c pull`: download now, run later."""

import sys

import click

_EPILOG = """\b
Examples:
  phi-c pull phi-3-mini
  phi-c pull hf:microsoft/Phi-3-mini-4k-instruct-gguf/Phi-3-mini-4k-instruct-q4.gguf@main
"""


@click.command("pull", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
def command(sources: tuple[str, ...], quiet: bool) -> None:
    """Download each SOURCE that is not there yet, or is newer on the hub, and print its path."""
    from phi_c import hub  # noqa: PLC0415 - `--help` does without

    for source in sources:
        path = hub.resolve(source, progress=not quiet and sys.stderr.isatty(), refresh=True)
        hub.resolve_tokenizer(source)
        click.echo(str(path))
