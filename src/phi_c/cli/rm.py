"""`phi-c rm`: removes downloaded models and caches."""

import sys
from typing import TYPE_CHECKING

import click
import cloup

from phi_c.errors import OptionError

if TYPE_CHECKING:
    from phi_c.removal import StoredFile

_EPILOG = """\b
Examples:
  phi-c rm smollm2
  phi-c rm packed prefix --yes
  phi-c rm all --dry-run
"""


@cloup.command("rm", epilog=_EPILOG)
@cloup.argument(
    "names",
    nargs=-1,
    required=True,
    metavar="NAME...",
    help="Preset; source as `phi-c list` prints it; or packed (packed-weight cache), prefix (prefix cache), "
    "random (random models of `phi-c bench`), tuning (tuning profiles) or all.",
)
@cloup.option_group(
    "Removal options",
    cloup.option("-y", "--yes", is_flag=True, help="Remove without asking for confirmation."),
    cloup.option("--dry-run", is_flag=True, help="Print what would be removed, and remove nothing."),
)
def command(names: tuple[str, ...], yes: bool, dry_run: bool) -> int:
    """Remove downloaded models and caches from disk, after confirmation.

    Models of the Hugging Face hub are in the cache of its client, which other programs use as well. "all" removes all
    GGUF files in it, but not the history of `phi-c chat`.
    """
    from phi_c import removal  # noqa: PLC0415 - not needed for `--help`

    files = removal.find(names)
    if not files:
        click.echo("nothing to remove")
        return 0
    total = _print_files(files)
    if dry_run:
        return 0
    if not yes:
        if not sys.stdin.isatty():
            raise OptionError(
                "stdin is not a terminal, expected one for the confirmation: use --yes to remove without it"
            )
        if not click.confirm("Remove?"):
            click.echo("nothing was removed", err=True)
            return 1
    removal.remove(files)
    click.echo(f"removed {total}")
    return 0


def _print_files(files: list["StoredFile"]) -> str:
    """Print each path with its size, then the total, which is returned."""
    from rich.filesize import decimal  # noqa: PLC0415

    for file in files:
        click.echo(f"{decimal(file.n_bytes):>10}  {file.path}")
    total = f"{len(files)} file{'s' if len(files) > 1 else ''}, {decimal(sum(file.n_bytes for file in files))}"
    click.echo(f"total: {total}")
    return total
