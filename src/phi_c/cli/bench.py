"""`phi-c bench`: speed of a model, or of each kernel, on this machine."""

import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.progress import status_line
from phi_c.errors import OptionError

if TYPE_CHECKING:
    from phi_c.bench.kernels import KernelSpeed

_MAX_NUMBERS = 1000  # in a range
_EPILOG = """\b
Examples:
  phi-c bench -m smollm2
  phi-c bench -m phi-3-mini --batch 1,16 --context 0,2000 --json
  phi-c bench --random phi-3-mini    # writes 2.4 GB to the cache
  phi-c bench -m smollm2 --tier avx2
  phi-c bench -m smollm2 --batch 1..32  # speed by batch size, as a chart
  phi-c bench -m smollm2 --phases       # time of each phase of a step
  phi-c bench --kernels
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
    cloup.option("--kernels", is_flag=True, help="Measure each tensor type on each tier, in place of a model."),
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
        help="Number of tokens to decode per sequence.  [default: 64; 4 with more than 8 batch sizes]",
    ),
    cloup.option(
        "--batch",
        default="1,4,8,16",
        show_default=True,
        metavar="N,N..N,...",
        help="Numbers of concurrent sequences to measure, also as ranges, such as 1..8,16. More than 4 are drawn as a "
        "chart, with the ratio of each to the one before.",
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
        help="Number of repetitions; the median is reported.",
    ),
    cloup.option(
        "--phases",
        is_flag=True,
        help="Also report the time of each phase of the forward pass: computing, waiting for other threads, weights "
        "read per second.",
    ),
)
@cloup.option_group("Output options", opt.json_flag())
def command(
    model: str | None,
    random_name: str | None,
    kernels: bool,
    n_prefill: int,
    n_decode: int | None,
    batch: str,
    context: str,
    n_repeats: int,
    phases: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Measure prefill and decode speed of a model.

    Decoding is bound by memory bandwidth, so the read bandwidth is measured in the same run, and the share of it that
    decoding reaches is reported. Speeds are medians in tokens per second.
    """
    if [model is not None, random_name is not None, kernels].count(True) != 1:
        raise click.UsageError("expected one of -m/--model SOURCE, --random NAME and --kernels")
    batch_sizes, contexts = _parse_counts("--batch", batch, 1), _parse_counts("--context", context, 0)
    if kernels:
        _bench_kernels(n_repeats, as_json)
        return
    from phi_c import hub  # noqa: PLC0415 - with the next: not needed for `--help`
    from phi_c.bench import speed  # noqa: PLC0415

    if model is not None:
        hub.resolve(model, progress=sys.stderr.isatty())  # a download shows its own bar
    with status_line() as show:
        source = model or _random_model(random_name or "", show)
        n_decode = n_decode or speed.default_n_decode(len(batch_sizes))
        workload = speed.Workload(n_prefill, n_decode, batch_sizes, contexts, n_repeats, phases)
        report = speed.measure(source, workload, progress=show, **opt.specified(loading))
    if as_json:
        click.echo(json.dumps(report))
    else:
        from phi_c.cli.bench_report import print_report  # noqa: PLC0415

        print_report(report, workload)


def _parse_counts(option: str, text: str, minimum: int) -> tuple[int, ...]:
    """Return the numbers of a list such as 1..8,16, in its order and without repeats."""
    numbers: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\.\.([0-9]{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (minimum - 1, 0)
        if not minimum <= first <= last < first + _MAX_NUMBERS:
            raise OptionError(
                f"{option} is {text!r}, expected integers of at least {minimum}, such as {minimum},16, or ranges, such "
                f"as {minimum}..16, of at most {_MAX_NUMBERS} numbers"
            )
        numbers.update(dict.fromkeys(range(first, last + 1)))
    return tuple(numbers)


def _random_model(name: str, show: Callable[[str], None]) -> str:
    from phi_c.bench.random_model import random_model  # noqa: PLC0415

    def progress(done: int, total: int) -> None:
        show(f"writing random weights, {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    return str(random_model(name, progress))


def _bench_kernels(n_repeats: int, as_json: bool) -> None:
    from phi_c.bench.kernels import measure_kernels  # noqa: PLC0415

    rows = []
    with status_line() as show:
        for row in measure_kernels(n_repeats):
            show(f"{row.type_name} on {row.tier}")
            rows.append(row)
    if as_json:
        click.echo(json.dumps({"kernels": [_kernel_row(row) for row in rows]}))
    else:
        _print_kernels(rows)


def _kernel_row(row: "KernelSpeed") -> dict[str, Any]:
    return {
        "type": row.type_name,
        "tier": row.tier,
        "n_tokens": row.n_tokens,
        "us": round(row.seconds * 1e6, 1),
        "gb_s": round(row.gb_s, 2),
        "gmac_s": round(row.gmac_s, 2),
    }


def _print_kernels(rows: list["KernelSpeed"]) -> None:
    from rich import box  # noqa: PLC0415 - with the next: not needed for `--json`
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    counts = list(dict.fromkeys(row.n_tokens for row in rows))
    by_kernel: dict[tuple[str, str], dict[int, KernelSpeed]] = {}
    for row in rows:
        by_kernel.setdefault((row.type_name, row.tier), {})[row.n_tokens] = row
    table = Table(title="GB/s of weights, GMAC/s; one thread", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("type", "tier"):
        table.add_column(name, no_wrap=True)
    for n in counts:
        table.add_column(f"{n} token{'s' if n > 1 else ''}", justify="right", no_wrap=True)
    for (type_name, tier), by_count in by_kernel.items():
        table.add_row(type_name, tier, *(f"{by_count[n].gb_s:.2f} {by_count[n].gmac_s:7.2f}" for n in counts))
    Console(highlight=False).print(table)
