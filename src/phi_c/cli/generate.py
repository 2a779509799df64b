"""`phi-c generate`: a prompt in, text out."""

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from phi_c.cli.loading import load
from phi_c.cli.options import LOADING, SAMPLING, given, taken_for_loading
from phi_c.errors import OptionError

if TYPE_CHECKING:
    from phi_c.llm import LLM
    from phi_c.results import Chunk, Usage
    from phi_c.sampling.sampler import TokenLogprob

_EPILOG = """\b
Examples:
  phi-c generate --model smollm2 "Write a haiku about ice hockey"
  phi-c generate --raw --temperature 0 --max-tokens 40 "Once upon a time"
  git diff | phi-c generate --system "Explain this change in two sentences." -
"""


@click.command("generate", epilog=_EPILOG)
@click.argument("prompt", required=False)
@click.option("--prompt", "prompt_option", metavar="TEXT", help="The prompt, instead of the argument.")
@click.option("--system", metavar="TEXT", help="Instructions that come before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--parse-special", is_flag=True, help="Read <|end|> and the like in the prompt as special tokens.")
@click.option("--logprobs", type=int, metavar="K", help="With --json: log-probabilities, and the K likeliest tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of the text.")
@click.option("--stats", is_flag=True, help="Print counts and speed to stderr.")
@LOADING
@SAMPLING
def command(
    prompt: str | None,
    prompt_option: str | None,
    as_json: bool,
    stats: bool,
    model: str,
    **options: Any,
) -> int:
    """Write the answer to PROMPT as it comes; PROMPT - reads it from stdin.

    Text goes to stdout, everything else to stderr. Ctrl-C ends the text and keeps what was printed (exit code 130).
    """
    text = _prompt(prompt, prompt_option)
    if options["logprobs"] is not None and not as_json:
        raise OptionError("--logprobs needs --json")
    with load(model, **taken_for_loading(options)) as llm:
        pieces: list[Chunk] = []
        interrupted = False
        stream = llm.stream(text, **given(options))
        try:
            for piece in stream:
                pieces.append(piece)
                if not as_json:
                    click.echo(piece.text, nl=False)
        except KeyboardInterrupt:
            interrupted = True
        if as_json:
            click.echo(json.dumps(_result(llm, pieces, options), ensure_ascii=False))
        elif not "".join(p.text for p in pieces).endswith("\n"):
            click.echo()
        usage = pieces[-1].usage if pieces else None
        if usage is not None:
            _remark(llm, pieces, usage, stats=stats, max_tokens=options["max_tokens"])
    return 130 if interrupted else 0


def _prompt(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None:
        raise OptionError("the prompt was given twice, as an argument and with --prompt")
    prompt = argument if argument is not None else option
    if prompt is not None and prompt != "-":
        if not prompt:
            raise OptionError("the prompt is empty")
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give one, or - to read it from stdin")
    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"stdin is not UTF-8 text: byte {raw[error.start]:#04x} at {error.start}") from None
    if not text.strip():
        raise OptionError("the prompt on stdin is empty")
    return text


def _result(llm: "LLM", pieces: list["Chunk"], options: dict[str, Any]) -> dict[str, Any]:
    usage = pieces[-1].usage if pieces else None
    result: dict[str, Any] = {
        "model": llm.config.name,
        "text": "".join(p.text for p in pieces),
        "tokens": [token for p in pieces for token in p.tokens],
        "finish_reason": (pieces[-1].finish_reason if pieces else None) or "cancelled",
        "seed": options["seed"],
        "usage": _usage(usage) if usage is not None else None,
    }
    if options["logprobs"] is not None:
        result["logprobs"] = [_logprob(item) for p in pieces for item in p.logprobs or ()]
    return result


def _usage(usage: "Usage") -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tok_s": round(usage.prompt_tok_s, 2),
        "decode_tok_s": round(usage.decode_tok_s, 2),
    }


def _logprob(item: "TokenLogprob") -> dict[str, Any]:
    return {"token": item.token, "logprob": item.logprob, "top": [list(pair) for pair in item.top]}


def _remark(llm: "LLM", pieces: list["Chunk"], usage: "Usage", *, stats: bool, max_tokens: int | None) -> None:
    if pieces[-1].finish_reason == "length" and usage.completion_tokens != max_tokens:
        click.echo(f"phi-c: the context of {llm.n_ctx} tokens is full (--n-ctx sets it)", err=True)
    if stats:
        click.echo(
            f"prompt: {usage.prompt_tokens} tokens, {usage.prompt_tok_s:.1f} tok/s; "
            f"text: {usage.completion_tokens} tokens, {usage.decode_tok_s:.1f} tok/s; "
            f"{llm.tier}, {llm.n_threads} threads",
            err=True,
        )
