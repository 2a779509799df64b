"""`phi-c generate`: streams the reply to one prompt."""

import json
import sys
from typing import TYPE_CHECKING, Any

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.inputs import read_stdin
from phi_c.cli.loading import load
from phi_c.errors import OptionError

if TYPE_CHECKING:
    from phi_c.llm import LLM
    from phi_c.results import Chunk, Usage
    from phi_c.sampling.sampler import TokenLogprob

_EPILOG = """\b
Examples:
  phi-c generate -m smollm2 "Why is the sky blue?"
  phi-c generate --raw --temperature 0 -n 40 "Once upon a time"
  git diff | phi-c generate --system "Explain this change in two sentences." -
"""


@cloup.command("generate", epilog=_EPILOG)
@cloup.argument("prompt", required=False, help="User message; '-' reads it from stdin.")
@opt.inference_options()
@opt.generation_options(
    cloup.option("--prompt", "prompt_option", metavar="TEXT", help="User message, in place of the argument PROMPT."),
    cloup.option("--system", metavar="TEXT", help="System message."),
    cloup.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the chat template."),
    opt.parse_special(),
)
@opt.sampling_options()
@cloup.option_group(
    "Output options",
    opt.json_flag("Print one JSON object at the end, in place of the stream."),
    cloup.option(
        "--logprobs",
        type=int,
        metavar="K",
        help="Number of most probable tokens whose log-probabilities are added to each token of --json.",
    ),
    cloup.option("--stats", is_flag=True, help="Print token counts and speed in tok/s to stderr."),
)
def command(
    prompt: str | None,
    prompt_option: str | None,
    as_json: bool,
    stats: bool,
    model: str,
    **options: Any,
) -> int:
    """Generate a reply to PROMPT and stream it to stdout.

    Everything else goes to stderr. Ctrl-C stops generation, keeps what was printed and exits with code 130.
    """
    text = _read_prompt(prompt, prompt_option)
    if options["logprobs"] is not None and not as_json:
        raise OptionError("--logprobs needs --json")
    with load(model, **opt.pop_loading_options(options)) as llm:
        chunks: list[Chunk] = []
        interrupted = False
        stream = llm.stream(text, **opt.specified(options))
        try:
            for chunk in stream:
                chunks.append(chunk)
                if not as_json:
                    click.echo(chunk.text, nl=False)
        except KeyboardInterrupt:
            interrupted = True
        if as_json:
            click.echo(json.dumps(_json_result(llm, chunks, options), ensure_ascii=False))
        elif not "".join(chunk.text for chunk in chunks).endswith("\n"):
            click.echo()
        usage = chunks[-1].usage if chunks else None
        if usage is not None:
            _print_notes(llm, chunks, usage, stats=stats, max_tokens=options["max_tokens"])
    return 130 if interrupted else 0


def _read_prompt(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None:
        raise OptionError("the prompt was given twice: as an argument and with --prompt")
    prompt = argument if argument is not None else option
    if prompt is not None and prompt != "-":
        if not prompt:
            raise OptionError("the prompt is empty")
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("missing PROMPT: pass it as an argument, or '-' to read it from stdin")
    text = read_stdin()
    if not text.strip():
        raise OptionError("the prompt on stdin is empty")
    return text


def _json_result(llm: "LLM", chunks: list["Chunk"], options: dict[str, Any]) -> dict[str, Any]:
    usage = chunks[-1].usage if chunks else None
    result: dict[str, Any] = {
        "model": llm.config.name,
        "text": "".join(chunk.text for chunk in chunks),
        "tokens": [token for chunk in chunks for token in chunk.tokens],
        "finish_reason": (chunks[-1].finish_reason if chunks else None) or "cancelled",
        "seed": chunks[-1].seed if chunks else options["seed"],
        "usage": _json_usage(usage) if usage is not None else None,
    }
    if options["logprobs"] is not None:
        result["logprobs"] = [_json_logprob(item) for chunk in chunks for item in chunk.logprobs or ()]
    return result


def _json_usage(usage: "Usage") -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tok_s": round(usage.prompt_tok_s, 2),
        "decode_tok_s": round(usage.decode_tok_s, 2),
    }


def _json_logprob(item: "TokenLogprob") -> dict[str, Any]:
    return {"token": item.token, "logprob": item.logprob, "top": [list(pair) for pair in item.top]}


def _print_notes(llm: "LLM", chunks: list["Chunk"], usage: "Usage", *, stats: bool, max_tokens: int | None) -> None:
    if chunks[-1].finish_reason == "length" and usage.completion_tokens != max_tokens:
        click.echo(f"phi-c: stopped because the context of {llm.n_ctx} tokens is full (--ctx-size sets it)", err=True)
    if stats:
        click.echo(
            f"prefill: {usage.prompt_tokens} tokens, {usage.prompt_tok_s:.1f} tok/s; "
            f"decode: {usage.completion_tokens} tokens, {usage.decode_tok_s:.1f} tok/s; "
            f"{llm.tier}, {llm.n_threads} threads",
            err=True,
        )
