"""The `phi-c` command. Each verb has a module of the same name, which is imported when the verb is called.

How verbs take their operands:

- A verb that loads one model takes it as -m/--model SOURCE. Verbs that run a model on an input (generate, chat, score,
  embed, tokens, perplexity) default to a preset; verbs about a certain model (bench, inspect, imatrix) do not.
  compare evaluates -m/--model SOURCE against --reference SOURCE.
- Verbs whose operands are files or names take them as positional arguments: quantize IN OUT TYPE,
  convert SOURCE [OUTPUT], pull SOURCE..., rm NAME..., completion SHELL.
- Options that load a model have the same names everywhere (phi_c.cli.options.loading_options). The Python names of
  -c/--ctx-size, -b/--batch-size and -t/--threads are n_ctx, n_batch and n_threads.
- The help of an option is a sentence that begins with a verb or a noun phrase and names the value and its unit. The
  default follows in brackets.
"""

import importlib
import io
import os
import sys
from typing import NoReturn

import click

from phi_c.errors import OptionError, PhiError

SECTIONS = {
    "Run a model": {
        "generate": "Generate a reply to a prompt.",
        "chat": "Chat with a model.",
        "score": "Print the log-probabilities of continuations of a prompt.",
        "embed": "Print embedding vectors of inputs.",
        "tokens": "Tokenize text.",
    },
    "Evaluate a model": {
        "bench": "Measure prefill and decode speed.",
        "perplexity": "Compute the perplexity of a text file.",
        "compare": "Compute the KL divergence from a reference model.",
    },
    "Model files": {
        "inspect": "Show metadata, tensors and memory of a model file.",
        "convert": "Convert a Hugging Face model to GGUF.",
        "imatrix": "Compute an importance matrix for quantisation.",
        "quantize": "Quantise a model file.",
    },
    "Downloads and caches": {
        "pull": "Download models.",
        "list": "List presets, downloaded models and caches.",
        "rm": "Remove downloaded models and caches.",
    },
    "Setup": {
        "doctor": "Show CPU features, memory bandwidth and caches.",
        "completion": "Print the completion script of a shell.",
    },
}
VERBS = [verb for verbs in SECTIONS.values() for verb in verbs]

_EPILOG = """\b
Examples:
  phi-c generate -m smollm2 "Why is the sky blue?"
  phi-c chat -m ./Phi-3-mini-4k-instruct-q4.gguf
"""


class _Verbs(click.Group):
    """Imports the module of a verb only when it is needed: `phi-c --version` needs none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return VERBS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"phi_c.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, VERBS))
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(verb.ljust(width), summary) for verb, summary in verbs.items()])


@click.group(cls=_Verbs, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "-V", "--version", package_name="phi-c", prog_name="phi-c")
def group() -> None:
    """Run Microsoft's Phi models on CPUs."""


def main() -> NoReturn:
    """Run the command line and exit: code 2 for wrong usage, 1 for other errors, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console without UTF-8 shows a ? instead of raising
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
    """Return the exit code for output whose reader is gone, as after `| head`, without an error message."""
    # Python flushes stdout once more at exit, which would raise again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
