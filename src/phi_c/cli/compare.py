"""`phi-c compare`: how far two models are from each other."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from phi_c.cli.loading import load
from phi_c.cli.options import RUNNING, WINDOWS, given
from phi_c.cli.windows import bar, for_json, plus_minus, read_text

if TYPE_CHECKING:
    from phi_c.evaluate import Comparison

_EPILOG = """\b
Examples:
  phi-c compare model-f16.gguf model-q4_k_m.gguf --text wiki.test.raw
  phi-c compare model-f16.gguf model-q4_k_m.gguf --text wiki.test.raw --chunks 16 --json
"""


@click.command("compare", epilog=_EPILOG)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--text",
    "file",
    required=True,
    metavar="FILE",
    help="The text on which they are compared; - reads it from stdin.",
)
@WINDOWS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@RUNNING
def command(a: str, b: str, file: str, n_ctx: int, n_windows: int | None, as_json: bool, **loading: Any) -> None:
    """Measure how far the predictions of model B are from those of A, which is the reference.

    KL(A || B), in nats a token, and how often both find the same token likeliest: after every token of windows of
    --ctx, each with a BOS token if the models want one. Both models are in memory. Standard errors take windows as
    independent.
    """
    text = read_text(file)
    with (
        load(a, n_ctx=n_ctx, **given(loading)) as first,
        load(b, n_ctx=n_ctx, **given(loading)) as second,
        bar("mean KL") as show,
    ):
        from phi_c.evaluate import compare  # noqa: PLC0415 - `--help` does without

        def progress(done: int, total: int, so_far: float) -> None:
            show(done, total, f"mean KL {so_far:.5f}")

        found = compare(first, second, text, n_ctx=n_ctx, n_windows=n_windows, progress=progress)
        names = first.path.name, second.path.name
    if as_json:
        figures = {"a": names[0], "b": names[1], **for_json(dataclasses.asdict(found)), "n_ctx": n_ctx}
        click.echo(json.dumps(figures, ensure_ascii=False))
    else:
        _print(found, n_ctx)


def _print(found: "Comparison", n_ctx: int) -> None:
    from rich.console import Console  # noqa: PLC0415 - `--json` does without
    from rich.table import Table  # noqa: PLC0415

    rows = [
        ("mean KL", plus_minus(found.kl, found.kl_standard_error, ".5f")),
        ("median", f"{found.kl_median:.5f}"),
        ("99 %", f"{found.kl_99:.5f}"),
        ("largest", f"{found.kl_max:.5f}"),
        ("same top token", plus_minus(found.top1_agreement, found.top1_agreement_standard_error, ".2%")),
        ("perplexity of A", f"{found.perplexity_a:.4f}"),
        ("perplexity of B", f"{found.perplexity_b:.4f}"),
        ("B's over A's", plus_minus(found.perplexity_ratio, found.perplexity_ratio_standard_error, ".5f")),
        ("tokens", f"{found.n_tokens}, in windows of {n_ctx}"),
    ]
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print(table)
    by_position = Table("positions", "mean KL", "same top", box=None, title="by position", title_justify="left")
    for bucket in found.by_position:
        by_position.add_row(f"{bucket.first}-{bucket.last}", f"{bucket.kl:.5f}", f"{bucket.top1_agreement:.2%}")
    console.print(by_position)
