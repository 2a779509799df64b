"""`phi-c convert`: safetensors to GGUF."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import click

_EPILOG = """\b
Examples:
  phi-c convert ./Phi-3.5-mini-instruct
  phi-c convert hf:microsoft/Phi-4-mini-instruct phi-4-mini.gguf --outtype f16
"""


@click.command("convert", epilog=_EPILOG)
@click.argument("source")
@click.argument("output", required=False, type=click.Path())
@click.option(
    "--outtype",
    type=click.Choice(["auto", "f32", "f16", "bf16"]),
    default="auto",
    show_default=True,
    help="Type of the matrices; auto: as they are stored. Vectors stay f32.",
)
@click.option("--force", "-f", is_flag=True, help="Replace an existing file.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
def command(source: str, output: str | None, outtype: str, force: bool, quiet: bool) -> None:
    """Write the model in SOURCE, a folder of safetensors or hf:owner/repo[@revision], to the GGUF file OUTPUT.

    Without OUTPUT the file lies in the current folder and is called after the model and the type. Its path is printed.
    Phi-2, Phi-3, Phi-3.5, Phi-3.5-MoE, Phi-4 and Llama models are understood.
    """
    from phi_c.convert.run import convert  # noqa: PLC0415 - `--help` does without

    shown = not quiet and sys.stderr.isatty()
    with _bar(shown) as progress:
        path = convert(source, output, outtype=outtype, force=force, show_download=shown, progress=progress)
    click.echo(str(path))


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Callable[[int, int], None]]:
    if not shown:
        yield lambda done, total: None
        return
    from rich.console import Console  # noqa: PLC0415 - for terminals
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = None

        def progress(done: int, total: int) -> None:
            nonlocal task
            if task is None:  # downloads have had bars of their own before
                task = bars.add_task("writing", total=total)
            bars.update(task, completed=done)

        yield progress
