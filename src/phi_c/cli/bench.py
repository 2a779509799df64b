"""`phi-c bench`: speed of a model, or of each kernel, on this machine."""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
import cloup

from phi_c.cli import kernel_report
from phi_c.cli import options as opt
from phi_c.cli.output import name_value_table
from phi_c.cli.progress import status_line

if TYPE_CHECKING:
    from phi_c.bench.speed import Workload

_EPILOG = """\b
Examples:
  phi-c bench -m smollm2
  phi-c bench -m phi-3-mini --batch 1,16 --context 0,2000 --json
  phi-c bench --random phi-3-mini    # writes 2.4 GB to the cache
  phi-c bench -m smollm2 --tier avx2
  phi-c bench --kernels --type Q4_K,Q6_K --tokens 1,16
  phi-c bench --kernels --op attention,rms_norm --json > before.json
  phi-c bench --kernels --op attention,rms_norm --compare before.json
"""


@cloup.command("bench", epilog=_EPILOG)
@cloup.option_group(
    "What to measure",
    opt.model_option(),
    cloup.option(
        "--random",
        "random_name",
        metavar="NAME",
        help="Random weights with the shapes of a known model, such as phi-3-mini, in place of --model.",
    ),
    cloup.option("--kernels", is_flag=True, help="Measure single kernels, in place of a model."),
)
@opt.loading_options(opt.ctx_size_option("Context size in tokens.  [default: what the workload needs]", minimum=1))
@cloup.option_group(
    "Workload options",
    opt.count_option(
        "--prefill",
        "n_prefill",
        default=512,
        show_default=True,
        help="Prompt length of the prefill measurement in tokens.",
    ),
    opt.count_option(
        "--decode",
        "n_decode",
        default=64,
        show_default=True,
        help="Number of tokens to decode per sequence.",
    ),
    cloup.option(
        "--batch",
        default="1,4,8,16",
        show_default=True,
        metavar="N,...",
        help="Numbers of concurrent sequences to measure.",
    ),
    cloup.option(
        "--context",
        default="0",
        show_default=True,
        metavar="N,...",
        help="Context lengths at which decoding is measured, in tokens.",
    ),
    opt.count_option(
        "--repeat",
        "n_repeats",
        default=5,
        show_default=True,
        help="Number of repetitions, of which the median is reported; 15 by default with --kernels.",
    ),
)
@kernel_report.kernel_options()
@cloup.option_group("Output options", opt.json_flag())
def command(
    model: str | None,
    random_name: str | None,
    kernels: bool,
    n_prefill: int,
    n_decode: int,
    batch: str,
    context: str,
    n_repeats: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure prefill and decode speed of a model, or the speed of kernels.

    Decoding is bound by memory bandwidth, so the read bandwidth is measured in the same run, and the share of it that
    decoding reaches is reported. Speeds are medians in tokens per second.
    """
    if [model is not None, random_name is not None, kernels].count(True) != 1:
        raise click.UsageError("expected one of -m/--model SOURCE, --random NAME and --kernels")
    kernel_report.check_options(click.get_current_context(), kernels=kernels)
    if kernels:
        kernel_report.run(click.get_current_context())
        return
    batch_sizes, contexts = opt.parse_counts("--batch", batch, 1), opt.parse_counts("--context", context, 0)
    from phi_c import hub  # noqa: PLC0415 - with the next: not needed for `--help`
    from phi_c.bench import speed  # noqa: PLC0415

    if model is not None:
        hub.resolve(model, progress=sys.stderr.isatty())  # a download shows its own bar
    with status_line() as show:
        source = model or _random_model(random_name or "", show)
        workload = speed.Workload(n_prefill, n_decode, batch_sizes, contexts, n_repeats)
        report = speed.measure(source, workload, progress=show, **opt.specified(opt.pop_loading_options(options)))
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print_report(report, workload)


def _random_model(name: str, show: Callable[[str], None]) -> str:
    from phi_c.bench.random_model import random_model  # noqa: PLC0415

    def progress(done: int, total: int) -> None:
        show(f"writing random weights, {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    return str(random_model(name, progress))


def _print_report(report: dict[str, Any], workload: "Workload") -> None:
    from rich.console import Console  # noqa: PLC0415 - with the next: not needed for `--json`
    from rich.filesize import decimal  # noqa: PLC0415

    rows = [
        ("model", report["model"]),
        ("tier", f"{report['tier']}, {report['n_threads']} threads"),
        ("tuning", report["tuning"]),
        (f"prefill {workload.n_prefill}", f"{report['prefill_tok_s']:.1f} tok/s"),
        ("decode", f"{report['decode_tok_s']:.2f} tok/s"),
    ]
    rows += [(f"batch {row['n_seqs']}", f"{row['tok_s']:.2f} tok/s") for row in report["batch"] if row["n_seqs"] > 1]
    rows += [
        (f"decode after {row['n_tokens']} tokens", f"{row['tok_s']:.2f} tok/s")
        for row in report["context"]
        if row["n_tokens"] > 0
    ]
    rows.append(("weights", f"{decimal(report['weight_bytes_per_token'])} read per token"))
    if report["read_gb_s"] is None:
        rows.append(("bandwidth", "unknown: not enough free memory to measure it"))
    else:
        rows.append(("bandwidth", f"{report['read_gb_s']:.1f} GB/s; decoding reaches {report['bandwidth_share']:.0%}"))
    peak = report["peak_rss_bytes"]
    rows += [
        ("peak memory", "unknown" if peak is None else decimal(peak)),
        ("start", f"{report['load_s']:.2f} s to load, {report['first_token_s']:.2f} s to the first token"),
        ("logits hash", report["logits_hash"]),
    ]
    Console(highlight=False).print(name_value_table(rows))
