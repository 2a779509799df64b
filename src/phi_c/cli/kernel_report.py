"""`phi-c bench --kernels`: its options, and the tables that it prints."""

import json
from itertools import groupby
from typing import Any

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.progress import status_line
from phi_c.errors import OptionError

NAMES = ("ops", "types", "tokens", "n_rows", "n_cols", "data", "compare")  # parameters of kernel_options
_SHARED = ("kernels", "tier", "n_repeats", "as_json", *NAMES)


def kernel_options() -> opt.Decorator:
    """Return the section of the options that choose kernels. --tier and --repeat are shared with other sections."""
    return cloup.option_group(
        "Kernel options (with --kernels)",
        cloup.option("--op", "ops", metavar="OP,...", default="matmul", show_default=True,
                     help="Operations to measure: matmul, attention, sample, barrier, rms_norm and others, or all."),
        cloup.option("--type", "types", metavar="TYPE,...", help="Tensor types, such as Q4_K.  [default: all]"),
        cloup.option("--tokens", metavar="N,...", default="1,4,16,512", show_default=True,
                     help="Numbers of tokens per product."),
        opt.count_option("--rows", "n_rows",
                         help="Number of weight rows.  [default: 256 KiB of weights, which fit a second-level cache]"),
        opt.count_option("--cols", "n_cols",
                         help="Number of weight columns, or of vector elements.  [default: those of Phi-3-mini]"),
        cloup.option("--memory/--cache", "data", default=None,
                     help="Weights in memory, or in cache.  [default: cache, and both up to 16 tokens]"),
        cloup.option("--compare", metavar="FILE",
                     help="JSON output of an earlier run: print the ratio of the times, now to then."),
    )  # fmt: skip


def check_options(context: click.Context, *, kernels: bool) -> None:
    """Raise OptionError if a kernel option is given without --kernels, or another one with it."""
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name or "") != click.core.ParameterSource.COMMANDLINE:
            continue
        if kernels and parameter.name not in _SHARED:
            raise OptionError(f"{parameter.opts[-1]} does not apply to --kernels, expected an option of kernels")
        if not kernels and parameter.name in NAMES:
            raise OptionError(f"{parameter.opts[-1]} is an option of kernels, expected it together with --kernels")


def run(context: click.Context) -> None:
    """Measure the kernels that the options of `phi-c bench` select, and print a report."""
    from phi_c.bench import comparison, rounds  # noqa: PLC0415 - with the next: not needed for `--help`
    from phi_c.bench.kernels import Kernel, make_cases  # noqa: PLC0415

    options = context.params
    is_given = context.get_parameter_source("n_repeats") == click.core.ParameterSource.COMMANDLINE
    n_samples = options["n_repeats"] if is_given else rounds.N_SAMPLES
    earlier = comparison.read_report(options["compare"]) if options["compare"] is not None else None
    with status_line() as show:
        show("filling memory with weights")
        cases = make_cases(_selection(context))
        if earlier is not None:
            measured = [case.name for case in cases if isinstance(case.name, Kernel)]
            comparison.check_common(options["compare"], earlier, measured)
        report = rounds.measure(cases, n_samples, show)
    if earlier is not None:
        comparison.add_ratios(report, earlier)
    if options["as_json"]:
        click.echo(json.dumps(report))
    else:
        _print(report)


def _selection(context: click.Context) -> Any:
    from phi_c import _core  # noqa: PLC0415
    from phi_c.bench.kernels import CACHE, MEMORY, OPS, Selection  # noqa: PLC0415
    from phi_c.params import choose_tier  # noqa: PLC0415

    options = context.params
    ops = OPS if options["ops"] == "all" else parse_names("--op", options["ops"], (*OPS, "all"))
    for name in ("types", "tokens", "n_rows"):
        is_given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if is_given and "matmul" not in ops:
            option = {"types": "--type", "tokens": "--tokens", "n_rows": "--rows"}[name]
            raise OptionError(f"{option} applies to products, expected matmul in --op, found {options['ops']!r}")
    types = options["types"]
    tiers = options["tier"] or choose_tier(None)
    return Selection(
        ops=OPS if "all" in ops else ops,
        types=None if types is None else parse_names("--type", types, [t.name for t in _core.TENSOR_TYPES.values()]),
        tiers=None if tiers is None else parse_names("--tier", tiers, _core.tiers()),
        n_tokens=opt.parse_counts("--tokens", options["tokens"], 1),
        n_rows=options["n_rows"],
        n_cols=options["n_cols"],
        data=None if options["data"] is None else MEMORY if options["data"] else CACHE,
    )


def parse_names(option: str, text: str, known: "tuple[str, ...] | list[str]") -> tuple[str, ...]:
    """Return the names of a comma-separated list, once each. Raises OptionError for one that is not known."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in known:
            raise OptionError(f"{option} is {text!r}, expected one or several of {', '.join(known)}, found {name!r}")
    return names


def _print(report: dict[str, Any]) -> None:
    from rich import box  # noqa: PLC0415 - with the next: not needed for `--json`
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    console = Console(highlight=False)
    for op, group in groupby(report["kernels"], lambda row: row["op"]):
        rows = list(group)
        compared = "ratio" in rows[0]
        columns = _columns(rows, compared=compared)
        table = Table(title=f"{op}, one thread" if op != "barrier" else "barrier, by threads", title_justify="left",
                      box=box.SIMPLE_HEAD, pad_edge=False, padding=0)  # fmt: skip
        for name, justify in columns:
            table.add_column(name, justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*(_cell(name, row) for name, _ in columns))
        console.print(table)
    for line in _notes(report):
        console.print(line, soft_wrap=True, markup=False)


def _columns(rows: list[dict[str, Any]], *, compared: bool) -> list[tuple[str, Any]]:
    """Return the names of the columns that hold anything, and how they are justified."""
    texts = ("type", "tier", "tokens", "size", "data", "time", "+/-")
    figures = ("now/then", "95 %", "differs") if compared else ("cycles", "GB/s", "GMAC/s", "limit")
    names = [name for name in (*texts, *figures) if any(_cell(name, row) for row in rows)]
    return [(name, "left" if name in ("type", "tier", "data", "differs") else "right") for name in names]


def _cell(name: str, row: dict[str, Any]) -> str:
    if name in ("type", "tier", "size", "data"):
        return str(row[name])
    if name == "tokens":
        return str(row["n_tokens"])
    if name == "time":
        return _time(row["ns"])
    if name == "+/-":
        return f"{max(1 - row['ns_low'] / row['ns'], row['ns_high'] / row['ns'] - 1):.0%}"
    if name == "limit":
        return f"{row['share']:.0%}" if row["limit"] else ""
    if name == "95 %":
        return f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}" if row["ratio"] else ""
    if name == "differs":
        return "" if not row["differs"] else "slower" if row["ratio"] > 1 else "faster"
    key = {"cycles": "cycles", "GB/s": "gb_s", "GMAC/s": "gmac_s", "now/then": "ratio"}[name]
    return "" if row[key] is None else _short(row[key])


def _short(value: float) -> str:
    """Return a number with three digits, in thousands (k) or millions (M) from 10000 on."""
    scale, suffix = (1.0, "") if value < 1e4 else (1e3, "k") if value < 1e6 else (1e6, "M")
    value /= scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}{suffix}"


def _time(ns: float) -> str:
    """Return a time in the unit that suits it, with three digits."""
    factor, unit = (1.0, "ns") if ns < 1e3 else (1e3, "us") if ns < 1e6 else (1e6, "ms")
    return f"{_short(ns / factor)} {unit}"


def _notes(report: dict[str, Any]) -> list[str]:
    limits = [f"clock {report['clock_ghz']:.2f} GHz"]
    if report["read_gb_s"] is not None:
        limits.append(f"read rate {report['read_gb_s']:.1f} GB/s")
    for tier, rates in report["multiply_gmac_s"].items():
        limits += [f"{tier} {name} multiplies {rate:.0f} GMAC/s" for name, rate in rates.items()]
    lines = [f"{report['cpu']}: {', '.join(limits)}; {report['n_samples']} samples per kernel"]
    if any(row.get("differs") is not None for row in report["kernels"]):
        n_different = sum(bool(row["differs"]) for row in report["kernels"])
        n_compared = sum(row["differs"] is not None for row in report["kernels"])
        lines.append(f"{n_different} of {n_compared} kernels differ from the earlier run")
    lines.append(f"disturbed: {report['disturbed'] or 'no'}")
    return lines
