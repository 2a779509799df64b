"""`phi-c perplexity`: the perplexity of a text file."""

import dataclasses
import json
from typing import Any

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.inputs import read_text
from phi_c.cli.loading import load
from phi_c.cli.output import finite_or_null, plus_minus
from phi_c.cli.progress import window_bar

_EPILOG = """\b
Examples:
  phi-c perplexity -m smollm2 wiki.test.raw
  phi-c perplexity -m smollm2 -c 2048 --stride 512 --json wiki.test.raw
"""


@cloup.command("perplexity", epilog=_EPILOG)
@cloup.argument("file", help="Text file; '-' reads stdin.")
@opt.loading_options(opt.model_with_default(), opt.window_size(), more=(opt.tokenizer(),))
@cloup.option_group(
    "Evaluation options",
    opt.chunks("Maximum number of windows to evaluate.", "n_windows"),
    opt.count_option(
        "--stride",
        help="Distance between the beginnings of windows in tokens.  [default: the window size]",
    ),
)
@cloup.option_group("Output options", opt.json_flag())
def command(
    file: str, n_ctx: int, n_windows: int | None, stride: int | None, as_json: bool, model: str, **loading: Any
) -> None:
    """Compute the perplexity of the text in FILE.

    The text is split into windows of --ctx-size tokens, each with a BOS token if the model uses one. The second half
    of each window is scored, as in llama.cpp. With --stride, windows overlap and each token is scored once, as in the
    transformers guide. The standard error assumes that windows are independent.
    """
    text = read_text(file)
    with load(model, n_ctx=n_ctx, **loading) as llm, window_bar("perplexity") as show:
        from phi_c.evaluate import Perplexity, perplexity  # noqa: PLC0415 - not needed for `--help`

        def progress(done: int, total: int, so_far: Perplexity) -> None:
            show(done, total, f"perplexity {plus_minus(so_far.perplexity, so_far.standard_error, '.3f')}")

        result = perplexity(llm, text, n_ctx=n_ctx, stride=stride, n_windows=n_windows, progress=progress)
        name = llm.config.name
    if as_json:
        figures = {"model": name, **dataclasses.asdict(result), "n_ctx": n_ctx, "stride": stride}
        click.echo(json.dumps(finite_or_null(figures), ensure_ascii=False))
        return
    windows = f"{result.n_windows} window{'s' if result.n_windows > 1 else ''}"
    click.echo(
        f"perplexity {plus_minus(result.perplexity, result.standard_error, '.4f')} "
        f"({result.n_tokens} tokens in {windows} of {n_ctx})"
    )
