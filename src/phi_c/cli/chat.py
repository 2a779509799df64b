"""`phi-c chat`: a conversation with a model. Earlier turns are served from the KV cache."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.loading import load
from phi_c.errors import PhiError

if TYPE_CHECKING:
    from phi_c.llm import LLM

_EPILOG = """\b
Examples:
  phi-c chat -m smollm2
  phi-c chat --system "Answer in one sentence." --temperature 0.3
"""

_HELP = """\
/system TEXT  set the system message; the conversation continues
/reset        clear the conversation, keep the system message
/save FILE    save the conversation as JSON
/exit         leave (or Ctrl-D)
Ctrl-C stops a reply and keeps what was printed."""


@dataclass
class Conversation:
    """The system message and the turns of a conversation."""

    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """Return all messages, the system message first."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns


@cloup.command("chat", epilog=_EPILOG)
@opt.inference_options()
@opt.generation_options(cloup.option("--system", metavar="TEXT", help="System message."))
@opt.sampling_options()
def command(
    system: str | None,
    model: str,
    **options: Any,
) -> None:
    """Chat with a model.

    Type /help during the conversation for its commands. On a terminal, input has line editing and a history.
    """
    with load(model, **opt.pop_loading_options(options)) as llm:
        conversation = Conversation(system)
        read_line = _line_reader()
        if sys.stdin.isatty():
            click.echo(f"{llm.config.name}, context {llm.n_ctx} tokens; /help for help, /exit to leave", err=True)
        while (line := read_line()) is not None:
            if line.startswith("/"):
                if not _run_command(line, conversation):
                    return
            elif line.strip():
                _reply(llm, conversation, line, options)


def _line_reader() -> Callable[[], str | None]:
    """Return a function that returns the next line, None at the end; with editing and history on a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_piped_line
    from prompt_toolkit import PromptSession  # noqa: PLC0415 - for terminals only
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory  # noqa: PLC0415

    from phi_c.storage import cache_dir  # noqa: PLC0415

    history: History = InMemoryHistory()
    path = cache_dir() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        history = FileHistory(str(path))
    except OSError:
        click.echo(f"{path} cannot be written: the history is lost at the end of this conversation", err=True)
    session: PromptSession[str] = PromptSession(history=history)

    def read_line() -> str | None:
        while True:
            try:
                return session.prompt("> ")
            except KeyboardInterrupt:  # clears the line, as in a shell
                continue
            except EOFError:
                return None

    return read_line


def _read_piped_line() -> str | None:
    raw = sys.stdin.buffer.readline()
    return raw.decode("utf-8", "replace").rstrip("\r\n") if raw else None


def _run_command(line: str, conversation: Conversation) -> bool:
    """Run a line that begins with a slash; returns False if it ends the conversation."""
    verb, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if verb in ("/exit", "/quit", "/bye"):
        return False
    if verb == "/reset":
        conversation.turns.clear()
        click.echo("conversation cleared", err=True)
    elif verb == "/system":
        conversation.system = rest or None
        click.echo("system message set" if rest else "system message removed", err=True)
    elif verb == "/save":
        _save(rest, conversation)
    elif verb in ("/help", "/?"):
        click.echo(_HELP, err=True)
    else:
        click.echo(f"unknown command {verb}; /help lists the commands", err=True)
    return True


def _save(name: str, conversation: Conversation) -> None:
    from phi_c.storage import atomic_write  # noqa: PLC0415

    if not name:
        click.echo("/save needs a file name", err=True)
        return
    path = Path(name).expanduser()
    try:
        with atomic_write(path) as file:
            file.write(json.dumps(conversation.messages(), ensure_ascii=False, indent=2).encode("utf-8") + b"\n")
    except PhiError as error:
        click.echo(f"phi-c: error: {error}", err=True)
    else:
        click.echo(f"saved {len(conversation.messages())} messages to {path}", err=True)


def _reply(llm: "LLM", conversation: Conversation, line: str, options: dict[str, Any]) -> None:
    """Stream the reply to a user message, and add both to the conversation."""
    question = {"role": "user", "content": line}
    text, finish = "", None
    try:
        try:
            for chunk in llm.chat_stream([*conversation.messages(), question], **opt.specified(options)):
                text, finish = text + chunk.text, chunk.finish_reason
                click.echo(chunk.text, nl=False)
        except KeyboardInterrupt:
            pass  # the conversation keeps what was printed
        click.echo()
    except PhiError as error:
        click.echo(f"phi-c: error: {error}; /reset clears the conversation", err=True)
        return
    conversation.turns += [question, {"role": "assistant", "content": text}]
    if finish == "length" and not options["max_tokens"]:
        click.echo(f"the context of {llm.n_ctx} tokens is full; /reset clears the conversation", err=True)
