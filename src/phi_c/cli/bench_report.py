"""Output of `phi-c bench` for a model: figures, the curve of batch sizes, and the phases of the forward pass."""

from typing import TYPE_CHECKING, Any

from phi_c.bench.batch_curve import chart
from phi_c.cli.output import name_value_table

if TYPE_CHECKING:
    from rich.table import Table

    from phi_c.bench.speed import Workload

_MAX_BATCH_ROWS = 4  # more batch sizes are drawn as a chart


def print_report(report: dict[str, Any], workload: "Workload") -> None:
    """Print the report of phi_c.bench.speed.measure as tables."""
    from rich.console import Console  # noqa: PLC0415 - with the next: not needed for `--json`
    from rich.filesize import decimal  # noqa: PLC0415

    rows = [
        ("model", report["model"]),
        ("tier", f"{report['tier']}, {report['n_threads']} threads"),
        ("tuning", report["tuning"]),
        (f"prefill {workload.n_prefill}", f"{report['prefill_tok_s']:.1f} tok/s"),
        ("decode", f"{report['decode_tok_s']:.2f} tok/s"),
    ]
    is_curve = len(report["batch"]) > _MAX_BATCH_ROWS
    rows += [
        (f"batch {row['n_seqs']}", f"{row['tok_s']:.2f} tok/s")
        for row in report["batch"]
        if row["n_seqs"] > 1 and not is_curve
    ]
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
    console = Console(highlight=False)
    console.print(name_value_table(rows))
    if is_curve:
        console.print()
        console.print(chart(report["batch"], report["batch_steps"]), markup=False, soft_wrap=True)
    for case in report.get("phases", []):
        console.print()
        console.print(_phase_table(case, report["read_gb_s"]))


def _phase_table(case: dict[str, Any], read_gb_s: float | None) -> "Table":
    from rich import box  # noqa: PLC0415 - with the next: a tenth of a second
    from rich.table import Table  # noqa: PLC0415

    what = (
        f"prefill of {case['n_tokens']} tokens"
        if case["kind"] == "prefill"
        else f"decode, batch {case['n_seqs']}" + f", after {case['n_tokens']} tokens" * (case["n_tokens"] > 0)
    )
    rate = "" if read_gb_s is None else f"; read rate {read_gb_s:.1f} GB/s"
    title = f"{what}: {case['step_ms']:.2f} ms per step{rate}"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False
    )
    table.add_column("phase", no_wrap=True)
    for name in ("ms", "share", "waiting", "imbalance", "barriers", "GB/s", "of read", "GMAC/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in case["phases"]:
        table.add_row(
            row["phase"],
            f"{row['ms']:.2f}",
            f"{row['share']:.1%}",
            _cell(row, "waiting_share", ".1%"),
            _cell(row, "imbalance", ".3f"),
            _cell(row, "n_barriers", ".0f"),
            _cell(row, "gb_s", ".1f"),
            _cell(row, "read_share", ".0%"),
            _cell(row, "gmac_s", ".1f"),
        )
    return table


def _cell(row: dict[str, Any], name: str, form: str) -> str:
    return "" if row.get(name) is None else f"{row[name]:{form}}"
