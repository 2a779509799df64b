"""The `phi-c` command: one file a verb, loaded when it is called."""

import importlib
import io
import os
import sys
from typing import NoReturn

import click

from phi_c.errors import OptionError, PhiError

VERBS = {
    "generate": "Write the answer to a prompt, or what follows it.",
    "chat": "Hold a conversation.",
    "tokens": "Show how a text is cut into tokens.",
    "inspect": "Show what is in a model file, and the memory it takes.",
    "doctor": "Show what phi-c finds on this machine.",
    "bench": "Measure how fast a model runs.",
    "perplexity": "Measure how likely a model finds a text.",
    "compare": "Measure how far two models are from each other.",
    "imatrix": "Find out which weights of a model matter, for a quantiser.",
    "quantize": "Store a model in fewer bits a weight.",
    "convert": "Make a GGUF file of a Hugging Face folder.",
    "pull": "Download models.",
    "list": "List known and downloaded models.",
    "completion": "Print the script that completes commands in a shell.",
}

_EPILOG = """\b
Examples:
  phi-c generate --model smollm2 "Write a haiku about ice hockey"
  phi-c chat --model ./Phi-3-mini-4k-instruct-q4.gguf
"""


class _Verbs(click.Group):
    """Imports a verb's module when it is needed: `phi-c --version` waits for none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"phi_c.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="phi-c", prog_name="phi-c")
def group() -> None:
    """Run Microsoft's Phi models on a CPU."""


def main() -> NoReturn:
    """Run the command line; exit code 2 for wrong usage, 1 for another error, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # consoles that know no UTF-8 show a ? rather than stop
            stream.reconfigure(encoding="utf-8" if sys.platform == "win32" else None, errors="replace")
    code = _run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _close_stdout()
    sys.exit(code)


def _run() -> int:
    try:
        result = group.main(prog_name="phi-c", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        return _close_stdout()
    except click.UsageError as error:
        usage = error.ctx.get_usage() + "\n" if error.ctx is not None else ""
        click.echo(f"{usage}phi-c: error: {error.format_message()}", err=True)
        return 2
    except click.ClickException as error:
        click.echo(f"phi-c: error: {error.format_message()}", err=True)
        return error.exit_code
    except PhiError as error:
        return _report(error, 2 if isinstance(error, OptionError) else 1)
    except (OSError, MemoryError) as error:
        return _report(error, 1)


def _report(error: BaseException, code: int) -> int:
    if os.environ.get("PHI_C_DEBUG"):
        raise error
    click.echo(f"phi-c: error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
    return code


def _close_stdout() -> int:
    """Leave quietly when the reader of our output is gone, as after `| head`."""
    # Python flushes stdout once more when it exits, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
