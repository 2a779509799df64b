"""`phi-c perplexity`: how likely a model finds a text."""

import dataclasses
import json
from typing import Any

import click

from phi_c.cli.loading import load
from phi_c.cli.options import MODEL, RUNNING, TOKENIZER, WINDOWS, given
from phi_c.cli.windows import bar, for_json, plus_minus, read_text

_EPILOG = """\b
Examples:
  phi-c perplexity --model smollm2 wiki.test.raw
  phi-c perplexity --model smollm2 --ctx 2048 --stride 512 --json wiki.test.raw
"""


@click.command("perplexity", epilog=_EPILOG)
@click.argument("file")
@WINDOWS
@click.option("--stride", type=click.IntRange(1), metavar="N", help="Windows overlap: one every N tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@MODEL
@TOKENIZER
@RUNNING
def command(
    file: str, n_ctx: int, n_windows: int | None, stride: int | None, as_json: bool, model: str, **loading: Any
) -> None:
    """Measure the perplexity of a model on the text in FILE; - reads it from stdin.

    The text is cut into windows of --ctx tokens, each with a BOS token if the model wants one, of which the second
    half counts, as in llama.cpp. With --stride windows overlap and each token counts once, as in transformers' guide.
    The standard error takes windows as independent.
    """
    text = read_text(file)
    with load(model, n_ctx=n_ctx, **given(loading)) as llm, bar("perplexity") as show:
        from phi_c.evaluate import Perplexity, perplexity  # noqa: PLC0415 - `--help` does without

        def progress(done: int, total: int, so_far: Perplexity) -> None:
            show(done, total, f"perplexity {plus_minus(so_far.perplexity, so_far.standard_error, '.3f')}")

        found = perplexity(llm, text, n_ctx=n_ctx, stride=stride, n_windows=n_windows, progress=progress)
        name = llm.config.name
    if as_json:
        figures = {"model": name, **dataclasses.asdict(found), "n_ctx": n_ctx, "stride": stride}
        click.echo(json.dumps(for_json(figures), ensure_ascii=False))
        return
    windows = f"{found.n_windows} window{'s' if found.n_windows > 1 else ''}"
    click.echo(
        f"perplexity {plus_minus(found.perplexity, found.standard_error, '.4f')} "
        f"({found.n_tokens} tokens in {windows} of {n_ctx})"
    )
