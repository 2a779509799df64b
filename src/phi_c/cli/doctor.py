"""`phi-c doctor`: CPU features, cores, memory bandwidth and caches of this machine."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import click
import cloup
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from phi_c import _core, hub, machine
from phi_c.bench.memory import read_rate
from phi_c.cli import options as opt
from phi_c.cli.output import name_value_table
from phi_c.engine import prefix_cache
from phi_c.errors import PhiError
from phi_c.model import tuning
from phi_c.params import KV_MEMORY_SHARE, TIER_VARIABLE, choose_tier
from phi_c.storage import cache_dir

_EPILOG = """\b
Examples:
  phi-c doctor
  phi-c doctor --json > machine.json
  phi-c doctor --tune -m phi-3-mini
  PHI_C_ISA=scalar phi-c doctor
"""


@cloup.command("doctor", epilog=_EPILOG)
@cloup.option_group(
    "Tuning options",
    cloup.option("--tune", is_flag=True, help="Measure the kernels' settings and store the best."),
    opt.model_option(help="Model to measure with.  [default: random weights of every type]"),
    opt.threads(),
    opt.tier(),
)
@cloup.option_group("Output options", opt.json_flag())
def command(tune: bool, model: str | None, n_threads: int | None, tier: str | None, as_json: bool) -> None:
    """Show the CPU, its cores, the memory and its measured bandwidth, and the caches.

    With --tune, measure prefetch, batch and task sizes and waiting times of the kernels for a minute or more, and store
    the best in the tuning profile of this machine, which later loads with as many threads use. Results never change.

    The exit code is 2 if PHI_C_ISA names a tier that this machine does not support, and 1 for other errors.
    """
    if tune:
        from phi_c.cli.tuning import run_tuning  # noqa: PLC0415 - imports numpy

        run_tuning(model, n_threads, tier, as_json=as_json)
        return
    if model is not None or n_threads is not None or tier is not None:
        raise click.UsageError("--model, --threads and --tier need --tune")
    report, faults = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        Console(highlight=False).print(_table(report))
    if faults:
        raise faults[0]


def examine() -> tuple[dict[str, Any], list[PhiError]]:
    """Return the report, ready for JSON (None: unknown), and the errors found."""
    faults: list[PhiError] = []
    tier: str | None = None
    cache: dict[str, Any] = {"folder": None, "models": [], "prefix_bytes": None, "tuning": []}
    try:
        tier = choose_tier(None) or _core.default_tier()
    except PhiError as error:
        faults.append(error)
    try:
        cache["folder"] = str(cache_dir())
        cache["models"] = [
            {"name": m.name, "source": m.source, "path": str(m.path), "n_bytes": m.n_bytes} for m in hub.cached()
        ]
        cache["prefix_bytes"] = prefix_cache.stored_bytes()
        cache["tuning"] = [{**vars(p.key), "types": sorted(p.prefetch)} for p in tuning.load_all()]
    except PhiError as error:
        faults.append(error)
    n_threads = machine.default_threads()
    report = {
        "version": _version(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "cpu": {
            "name": machine.cpu_name(),
            "features": _core.cpu_features(),
            "tiers": _core.tiers(),
            "tier": tier,
            "forced": bool(os.environ.get(TIER_VARIABLE)),
        },
        "cores": {
            "affinity": len(machine.affinity_cpus()),
            "cgroup": machine.cgroup_cores(),
            "physical": machine.physical_cores(),
            "default_threads": n_threads,
        },
        "memory": {
            "total_bytes": _known(machine.memory_total()),
            "available_bytes": _known(machine.memory_available()),
            "kv_cache_share": KV_MEMORY_SHARE,
            "read_bytes_per_second": {str(n): read_rate(n) for n in sorted({1, n_threads})},
        },
        "cache": cache,
        "errors": [str(fault) for fault in faults],
    }
    return report, faults


def _version() -> str:
    try:
        return importlib.metadata.version("phi-c")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _known(n_bytes: int) -> int | None:
    return None if n_bytes == machine.UNKNOWN_BYTES else n_bytes


def _table(report: Mapping[str, Any]) -> Table:
    cpu, cores, memory, cache = (report[part] for part in ("cpu", "cores", "memory", "cache"))
    quota = "none" if cores["cgroup"] is None else f"{cores['cgroup']:g} cores"
    rates = [
        f"{n} thread{'s' if n != '1' else ''}: {_size(rate)}{'/s' if rate else ''}"
        for n, rate in memory["read_bytes_per_second"].items()
    ]
    models = [f"{model['name']} ({_size(model['n_bytes'])})" for model in cache["models"]]
    tier = f"{cpu['tier'] or 'none'}{f' (forced by {TIER_VARIABLE})' if cpu['forced'] else ''}"
    rows = [
        ("phi-c", report["version"]),
        ("python", report["python"]),
        ("system", report["system"]),
        ("CPU", cpu["name"]),
        ("features", ", ".join(cpu["features"]) or "none that phi-c uses"),
        ("tier", f"{tier}; supported: {', '.join(cpu['tiers'])}"),
        (
            "cores",
            f"{cores['physical']} physical, {cores['affinity']} in the CPU affinity, cgroup quota {quota}",
        ),
        ("threads", f"{cores['default_threads']} by default"),
        (
            "memory",
            f"{_size(memory['total_bytes'])}, {_size(memory['available_bytes'])} available, "
            f"of which a KV cache takes up to {memory['kv_cache_share']:.0%}",
        ),
        ("bandwidth", "; ".join(rates)),
        ("cache", cache["folder"] or "unknown"),
        ("models", "\n".join(models) or "none"),
        ("tuning", "\n".join(map(_profile, cache["tuning"])) or "none measured yet"),
        ("prefix cache", f"{_size(cache['prefix_bytes'])} in {prefix_cache.default_folder()}"),
    ]
    return name_value_table(rows)


def _profile(stored: Mapping[str, Any]) -> str:
    threads = f"{stored['n_threads']} thread{'s' if stored['n_threads'] > 1 else ''}"
    return f"{stored['cpu']}, {threads}, {stored['tier']}, phi-c {stored['version']}: {', '.join(stored['types'])}"


def _size(n_bytes: float | None) -> str:
    return "unknown" if n_bytes is None else decimal(int(n_bytes))
