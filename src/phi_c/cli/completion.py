"""`phi-c completion`: what a shell needs to complete commands and options."""

import click
from click.shell_completion import get_completion_class

_EPILOG = """\b
Examples:
  phi-c completion bash >> ~/.bashrc
  phi-c completion zsh >> ~/.zshrc
  phi-c completion fish > ~/.config/fish/completions/phi-c.fish
"""


@click.command("completion", epilog=_EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script that completes phi-c in SHELL."""
    from phi_c.cli import group  # noqa: PLC0415 - the group imports the verbs

    completion = get_completion_class(shell)
    if completion is None:
        raise click.UsageError(f"{shell} is not a shell that can be completed")
    # Not `.source()`: it asks the bash of this machine for its version, the script may be for another.
    script = completion(group, {}, "phi-c", "_PHI_C_COMPLETE")
    click.echo(script.source_template % script.source_vars())
