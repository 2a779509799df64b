"""`phi-c bench`: how fast a model, or each kernel, runs on this machine."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from phi_c.cli.options import KV, LAYOUT, given
from phi_c.errors import OptionError

if TYPE_CHECKING:
    from phi_c.bench.kernels import KernelSpeed

_EPILOG = """\b
Examples:
  phi-c bench smollm2
  phi-c bench Phi-3-mini-4k-instruct-q4.gguf --batch 1,16 --context 0,2000 --json
  phi-c bench --random phi-3-mini        # random weights, 2.4 GB in the cache: as fast as the real ones
  PHI_C_ISA=avx2 phi-c bench smollm2
  phi-c bench --kernels
"""


@click.command("bench", epilog=_EPILOG)
@click.argument("model", metavar="[MODEL]", required=False)
@click.option(
    "--random", "random_name", metavar="NAME", help="Random weights of a known model's sizes, written to the cache."
)
@click.option("--kernels", is_flag=True, help="Time each tensor type on each instruction set; needs no MODEL.")
@click.option("--prefill", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Prompt tokens.")
@click.option(
    "--decode", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Tokens of each text."
)
@click.option("--batch", default="1,4,8,16", show_default=True, metavar="N,...", help="Texts written together.")
@click.option("--context", default="0", show_default=True, metavar="N,...", help="Tokens before those that are timed.")
@click.option(
    "--repeat", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Repetitions, of which medians."
)
@click.option("--threads", "-t", "n_threads", type=int, metavar="N", help="Threads.  [default: physical cores]")
@LAYOUT
@KV
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str | None,
    random_name: str | None,
    kernels: bool,
    prefill: int,
    decode: int,
    batch: str,
    context: str,
    repeat: int,
    n_threads: int | None,
    layout: str | None,
    kv_type: str | None,
    as_json: bool,
) -> None:
    """Measure how fast MODEL reads a prompt and writes text: a path, a preset, hf:... or pypi:...

    Decoding is bound by how fast memory is read, so that rate is measured in the same run, and the share of it that
    decoding reaches is shown. Speeds are medians.
    """
    if [model is not None, random_name is not None, kernels].count(True) != 1:
        raise click.UsageError("name a MODEL, or ask for --random or --kernels")
    n_seqs, contexts = _counts("--batch", batch, 1), _counts("--context", context, 0)
    if kernels:
        _bench_kernels(repeat, as_json)
        return
    from phi_c import hub  # noqa: PLC0415 - with the next: `--help` does without
    from phi_c.bench import speed  # noqa: PLC0415

    if model is not None:
        hub.resolve(model, progress=sys.stderr.isatty())  # a download shows its own bar
    with _status() as say:
        source = model or _random_model(random_name or "", say)
        plan = speed.Plan(prefill, decode, n_seqs, contexts, repeat)
        options = given({"n_threads": n_threads, "layout": layout, "kv_type": kv_type})
        report = speed.measure(source, plan, progress=say, **options)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print_report(report, plan)


def _counts(option: str, text: str, least: int) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and int(part) >= least for part in parts):
        raise OptionError(f"{option} is {text!r}, expected integers of at least {least}, such as {least},16")
    return tuple(int(part) for part in parts)


@contextlib.contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """Give a function that says on a terminal's stderr what is going on; the line disappears in the end."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console  # noqa: PLC0415 - for terminals

    with Console(stderr=True, highlight=False).status("starting") as line:
        yield line.update


def _random_model(name: str, say: Callable[[str], None]) -> str:
    from phi_c.bench.random_model import random_model  # noqa: PLC0415

    def progress(done: int, total: int) -> None:
        say(f"writing random weights, {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    return str(random_model(name, progress))


def _bench_kernels(n_repeats: int, as_json: bool) -> None:
    from phi_c.bench.kernels import measure_kernels  # noqa: PLC0415

    rows = []
    with _status() as say:
        for row in measure_kernels(n_repeats):
            say(f"{row.type_name} on {row.tier}")
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


def _print_report(report: dict[str, Any], plan: Any) -> None:
    from rich.console import Console  # noqa: PLC0415 - `--json` does without
    from rich.filesize import decimal  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    rows = [
        ("model", report["model"]),
        ("runs on", f"{report['tier']}, {report['n_threads']} threads"),
        (f"prompt of {plan.n_prefill}", f"{report['prefill_tok_s']:.1f} tok/s"),
        (f"text of {plan.n_decode}", f"{report['decode_tok_s']:.2f} tok/s"),
    ]
    rows += [(f"{b['n_seqs']} together", f"{b['tok_s']:.2f} tok/s") for b in report["batch"] if b["n_seqs"] > 1]
    rows += [(f"after {c['n_tokens']}", f"{c['tok_s']:.2f} tok/s") for c in report["context"] if c["n_tokens"] > 0]
    weights = f"{decimal(report['weight_bytes_per_token'])} of weights a token"
    if report["read_gb_s"] is None:
        rows.append(("memory", f"{weights}, the read rate is unknown"))
    else:
        share = f"decoding reaches {report['bandwidth_share']:.0%}"
        rows.append(("memory", f"{weights}, read at {report['read_gb_s']:.1f} GB/s: {share}"))
    peak = report["peak_rss_bytes"]
    rows += [
        ("peak memory", "unknown" if peak is None else decimal(peak)),
        ("start", f"{report['load_s']:.2f} s to load, {report['first_token_s']:.2f} s to the first token"),
        ("logits", report["logits_hash"]),
    ]
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    Console(highlight=False).print(table)


def _print_kernels(rows: list["KernelSpeed"]) -> None:
    from rich import box  # noqa: PLC0415 - `--json` does without
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
    for (type_name, tier), found in by_kernel.items():
        table.add_row(type_name, tier, *(f"{found[n].gb_s:.2f} {found[n].gmac_s:7.2f}" for n in counts))
    Console(highlight=False).print(table)
