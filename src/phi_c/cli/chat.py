"""`phi-c chat`: a conversation; earlier turns are found in the cache, not computed again."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phi_c.cli.loading import load
from phi_c.cli.options import LOADING, SAMPLING, given, taken_for_loading
from phi_c.errors import PhiError

if TYPE_CHECKING:
    from phi_c.llm import LLM

_EPILOG = """\b
Examples:
  phi-c chat --model smollm2
  phi-c chat --system "Answer in one sentence." --temperature 0.3
"""

_HELP = """\
/system TEXT  new instructions; the conversation goes on
/reset        forget the conversation, keep the instructions
/save FILE    write the conversation as JSON
/exit         leave (or Ctrl-D)
Ctrl-C stops an answer; what was written stays."""


@dataclass
class Conversation:
    """What was said."""

    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """Return the messages, the instructions first."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns


@click.command("chat", epilog=_EPILOG)
@click.option("--system", metavar="TEXT", help="Instructions that come before the conversation.")
@LOADING
@SAMPLING
def command(
    system: str | None,
    model: str,
    **options: Any,
) -> None:
    """Hold a conversation; /help lists what else can be typed."""
    with load(model, **taken_for_loading(options)) as llm:
        conversation = Conversation(system)
        read = _reader()
        if sys.stdin.isatty():
            click.echo(f"{llm.config.name}, context {llm.n_ctx}; /help for help, /exit to leave", err=True)
        while (line := read()) is not None:
            if line.startswith("/"):
                if not _obey(line, conversation):
                    return
            elif line.strip():
                _answer(llm, conversation, line, options)


def _reader() -> Callable[[], str | None]:
    """Return what gives the next line, None at the end: with editing and history on a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_piped
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
        click.echo(f"{path} cannot be written: the history lasts for this conversation only", err=True)
    session: PromptSession[str] = PromptSession(history=history)

    def read() -> str | None:
        while True:
            try:
                return session.prompt("> ")
            except KeyboardInterrupt:  # clears the line, as in a shell
                continue
            except EOFError:
                return None

    return read


def _read_piped() -> str | None:
    raw = sys.stdin.buffer.readline()
    return raw.decode("utf-8", "replace").rstrip("\r\n") if raw else None


def _obey(line: str, conversation: Conversation) -> bool:
    """Run a command; False ends the conversation."""
    verb, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if verb in ("/exit", "/quit", "/bye"):
        return False
    if verb == "/reset":
        conversation.turns.clear()
        click.echo("the conversation is forgotten", err=True)
    elif verb == "/system":
        conversation.system = rest or None
        click.echo("new instructions" if rest else "no instructions", err=True)
    elif verb == "/save":
        _save(rest, conversation)
    elif verb in ("/help", "/?"):
        click.echo(_HELP, err=True)
    else:
        click.echo(f"{verb} is no command; /help lists them", err=True)
    return True


def _save(name: str, conversation: Conversation) -> None:
    from phi_c.storage import atomic_write  # noqa: PLC0415

    if not name:
        click.echo("/save needs the name of a file", err=True)
        return
    path = Path(name).expanduser()
    try:
        with atomic_write(path) as file:
            file.write(json.dumps(conversation.messages(), ensure_ascii=False, indent=2).encode("utf-8") + b"\n")
    except PhiError as error:
        click.echo(f"phi-c: error: {error}", err=True)
    else:
        click.echo(f"saved {len(conversation.messages())} messages to {path}", err=True)


def _answer(llm: "LLM", conversation: Conversation, line: str, options: dict[str, Any]) -> None:
    question = {"role": "user", "content": line}
    text, finish = "", None
    try:
        try:
            for piece in llm.chat_stream([*conversation.messages(), question], **given(options)):
                text, finish = text + piece.text, piece.finish_reason
                click.echo(piece.text, nl=False)
        except KeyboardInterrupt:
            pass  # what was written stays in the conversation
        click.echo()
    except PhiError as error:
        click.echo(f"phi-c: error: {error}; /reset forgets the conversation", err=True)
        return
    conversation.turns += [question, {"role": "assistant", "content": text}]
    if finish == "length" and not options["max_tokens"]:
        click.echo(f"the context of {llm.n_ctx} tokens is full: /reset forgets the conversation", err=True)
