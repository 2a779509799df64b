"""`phi-c completion`: prints the completion script of a shell."""

import click
import cloup
from click.shell_completion import get_completion_class

_EPILOG = """\b
Examples:
  phi-c completion bash >> ~/.bashrc
  phi-c completion zsh >> ~/.zshrc
  phi-c completion fish > ~/.config/fish/completions/phi-c.fish
"""


@cloup.command("completion", epilog=_EPILOG)
@cloup.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), help="Name of the shell.")
def command(shell: str) -> None:
    """Print the script that completes the commands and options of phi-c in SHELL."""
    from phi_c.cli import group  # noqa: PLC0415 - the group imports the verbs

    completion = get_completion_class(shell)
    if completion is None:
        raise click.UsageError(f"there is no completion for {shell}")
    # Not `.source()`: that runs the local bash to check its version, but the script may be for another machine.
    script = completion(group, {}, "phi-c", "_PHI_C_COMPLETE")
    click.echo(script.source_template % script.source_vars())
