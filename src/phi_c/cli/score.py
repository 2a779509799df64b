"""`phi-c score`: log-probabilities of given continuations of a prompt."""

import json
from typing import TYPE_CHECKING, Any

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.inputs import read_stdin
from phi_c.cli.loading import load

if TYPE_CHECKING:
    from phi_c.results import Score
    from phi_c.text.tokenizer import Tokenizer

_EPILOG = """\b
Examples:
  phi-c score -m smollm2 "The capital of France is" " Paris" " London" " Rome"
  phi-c score --json "2 + 2 =" " 4" | jq .scores[0].logprob
  printf "The sky is" | phi-c score -m smollm2 - " blue" " green"
"""


@cloup.command("score", epilog=_EPILOG)
@cloup.argument("prompt", help="Raw prompt, without the chat template; '-' reads it from stdin.")
@cloup.argument(
    "continuations",
    nargs=-1,
    required=True,
    metavar="CONTINUATION...",
    help="Text that follows PROMPT, with its leading space.",
)
@opt.inference_options()
@cloup.option_group("Prompt options", opt.parse_special())
@cloup.option_group("Output options", opt.json_flag("Print one JSON object, with the log-probability of every token."))
def command(
    prompt: str, continuations: tuple[str, ...], as_json: bool, parse_special: bool, model: str, **options: Any
) -> None:
    """Print the log-probability of each CONTINUATION of PROMPT.

    Log-probabilities are natural logarithms, summed over the tokens of a continuation. The column "greedy" shows
    whether greedy decoding would generate the continuation. Text is tokenized as lm-evaluation-harness does.
    """
    text = read_stdin() if prompt == "-" else prompt
    with load(model, **opt.pop_loading_options(options)) as llm:
        scores = llm.score(text, continuations, parse_special=parse_special)
        name, tokenizer = llm.config.name, llm.tokenizer
    if as_json:
        rows = [_json_score(c, score, tokenizer) for c, score in zip(continuations, scores, strict=True)]
        click.echo(json.dumps({"model": name, "prompt": text, "scores": rows}, ensure_ascii=False))
        return
    click.echo("   logprob  greedy  tokens  continuation")
    for continuation, score in zip(continuations, scores, strict=True):
        greedy = "yes" if score.is_greedy else "no"
        shown = json.dumps(continuation, ensure_ascii=False)
        click.echo(f"{score.logprob:10.4f}  {greedy:6}  {len(score.tokens):6}  {shown}")


def _json_score(continuation: str, score: "Score", tokenizer: "Tokenizer") -> dict[str, Any]:
    return {
        "continuation": continuation,
        "logprob": score.logprob,
        "is_greedy": score.is_greedy,
        "tokens": [
            {
                "id": token,
                "piece": tokenizer.piece(token, special=True).decode("utf-8", "backslashreplace"),
                "logprob": logprob,
            }
            for token, logprob in zip(score.tokens, score.logprobs, strict=True)
        ],
        "cached_tokens": score.cached_tokens,
    }
