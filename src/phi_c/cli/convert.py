"""`phi-c convert`: writes a Hugging Face model as a GGUF file."""

import sys

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.progress import byte_bar

_EPILOG = """\b
Examples:
  phi-c convert ./Phi-3.5-mini-instruct
  phi-c convert hf:microsoft/Phi-4-mini-instruct phi-4-mini.gguf --outtype f16
"""


@cloup.command("convert", epilog=_EPILOG)
@cloup.argument("source", help="Folder with safetensors files, or hf:owner/repo[@revision].")
@cloup.argument(
    "output",
    required=False,
    type=click.Path(),
    help="GGUF file to write. [default: named after the model and the type, in the current folder]",
)
@cloup.option_group(
    "Output options",
    cloup.option(
        "--outtype",
        type=click.Choice(["auto", "f32", "f16", "bf16"]),
        default="auto",
        show_default=True,
        help="Type of the matrices; auto keeps the type of the source. Vectors are f32.",
    ),
    cloup.option("-f", "--force", is_flag=True, help="Replace an existing file."),
    opt.quiet("Show no progress bar."),
)
def command(source: str, output: str | None, outtype: str, force: bool, quiet: bool) -> None:
    """Convert the Hugging Face model SOURCE to the GGUF file OUTPUT and print its path.

    Supports Phi-2, Phi-3, Phi-3.5, Phi-3.5-MoE, Phi-4, Phi-4-mini and Llama models.
    """
    from phi_c.convert.run import convert  # noqa: PLC0415 - not needed for `--help`

    show_download = not quiet and sys.stderr.isatty()
    with byte_bar("writing", quiet=quiet) as progress:
        path = convert(source, output, outtype=outtype, force=force, show_download=show_download, progress=progress)
    click.echo(str(path))
