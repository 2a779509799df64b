"""`phi-c compare`: KL divergence and top-1 agreement of a model with a reference model."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.inputs import read_text
from phi_c.cli.loading import load
from phi_c.cli.output import finite_or_null, name_value_table, plus_minus
from phi_c.cli.progress import window_bar

if TYPE_CHECKING:
    from phi_c.evaluate import Comparison

_EPILOG = """\b
Examples:
  phi-c compare -m model-q4_k_m.gguf --reference model-f16.gguf --text wiki.raw
  phi-c compare -m model-q4_0.gguf --reference model-f16.gguf --text wiki.raw \\
      --chunks 16 --json
"""


@cloup.command("compare", epilog=_EPILOG)
@opt.loading_options(
    opt.model_option(required=True, help="Model to evaluate."),
    opt.model_option("--reference", required=True, help="Model to compare with, such as the unquantised original."),
    opt.window_size(),
)
@cloup.option_group(
    "Evaluation options",
    cloup.option(
        "--text",
        "file",
        required=True,
        metavar="FILE",
        help="Text file on which the models are compared; '-' reads stdin.",
    ),
    opt.chunks("Maximum number of windows to evaluate.", "n_windows"),
)
@cloup.option_group("Output options", opt.json_flag())
def command(
    model: str, reference: str, file: str, n_ctx: int, n_windows: int | None, as_json: bool, **loading: Any
) -> None:
    """Compute the KL divergence of a model from a reference model, and their top-1 agreement.

    KL(reference || model) is in nats per token; top-1 agreement is the share of positions at which both models find
    the same token most probable. All positions of windows of --ctx-size tokens count; each window begins with a BOS
    token if the models use one. Both models are loaded at the same time. The standard errors assume that windows are
    independent.
    """
    text = read_text(file)
    with (
        load(reference, n_ctx=n_ctx, **loading) as reference_llm,
        load(model, n_ctx=n_ctx, **loading) as llm,
        window_bar("mean KL") as show,
    ):
        from phi_c.evaluate import compare  # noqa: PLC0415 - not needed for `--help`

        def progress(done: int, total: int, mean_kl: float) -> None:
            show(done, total, f"mean KL {mean_kl:.5f}")

        result = compare(reference_llm, llm, text, n_ctx=n_ctx, n_windows=n_windows, progress=progress)
        names = {"model": llm.path.name, "reference": reference_llm.path.name}
    if as_json:
        figures = {**names, **finite_or_null(dataclasses.asdict(result)), "n_ctx": n_ctx}
        click.echo(json.dumps(figures, ensure_ascii=False))
    else:
        _print_result(result, n_ctx)


def _print_result(result: "Comparison", n_ctx: int) -> None:
    from rich.console import Console  # noqa: PLC0415 - not needed for `--json`
    from rich.table import Table  # noqa: PLC0415

    rows = [
        ("KL divergence, mean", plus_minus(result.kl, result.kl_standard_error, ".5f")),
        ("KL divergence, median", f"{result.kl_median:.5f}"),
        ("KL divergence, 99th percentile", f"{result.kl_99:.5f}"),
        ("KL divergence, maximum", f"{result.kl_max:.5f}"),
        ("top-1 agreement", plus_minus(result.top1_agreement, result.top1_agreement_standard_error, ".2%")),
        ("perplexity of the model", f"{result.perplexity_b:.4f}"),
        ("perplexity of the reference", f"{result.perplexity_a:.4f}"),
        ("perplexity ratio", plus_minus(result.perplexity_ratio, result.perplexity_ratio_standard_error, ".5f")),
        ("tokens", f"{result.n_tokens}, in windows of {n_ctx}"),
    ]
    console = Console(highlight=False)
    console.print(name_value_table(rows))
    by_position = Table(
        "positions", "mean KL", "top-1 agreement", box=None, title="by position in the window", title_justify="left"
    )
    for bucket in result.by_position:
        by_position.add_row(f"{bucket.first}-{bucket.last}", f"{bucket.kl:.5f}", f"{bucket.top1_agreement:.2%}")
    console.print(by_position)
