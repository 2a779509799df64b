"""Compare the speed of phi-c and other engines on the same GGUF file with the same number of threads.

    python benchmarks/compare.py MODEL.gguf [--threads 2] [--rounds 3] [--tier avx512 --tier avx2] [--plot FILE.png]
    python benchmarks/compare.py MODEL.gguf --python xllamacpp=/path/to/its/python

Each measurement runs in a new process, so two engines are never loaded at once. The engines take turns in each round,
so that other load on the machine affects all of them. The table has medians, and phi-c's speed divided by the engine's.
Other engines are optional: for those not installed, the command that installs them is printed.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workers import WORKERS, Task

# Engine -> (module to look for, command that installs it).
_PEERS = {
    "llama-cpp-python": (
        "llama_cpp",
        'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python',
    ),
    "xllamacpp": ("xllamacpp", "pip install xllamacpp"),
    "mistralrs": ("mistralrs", "pip install mistralrs"),
}


@dataclass(frozen=True)
class Engine:
    """A row of the table."""

    label: str
    worker: str  # key of WORKERS
    python: str  # path of the interpreter
    tier: str | None = None  # phi-c's instruction-set tier; None: the best


Speeds = dict[str, float]  # column -> tok/s


def main() -> None:
    options = _parser().parse_args()
    if options.worker:
        _work(options.worker)
        return
    if options.model is None:
        raise SystemExit("compare.py: error: MODEL is missing, expected a GGUF file")
    path = Path(options.model).expanduser().resolve()
    if not path.is_file():
        raise SystemExit(f"compare.py: error: {options.model} does not exist, expected a GGUF file")
    n_seqs = tuple(int(n) for n in options.batch.split(","))
    task = Task(str(path), options.threads, options.prefill, options.decode, n_seqs)
    engines = list(_engines(options))
    results: dict[str, list[Speeds]] = {engine.label: [] for engine in engines}
    for i in range(options.rounds):
        for engine in engines:
            speeds = _measure(engine, task)
            if speeds is not None:
                results[engine.label].append(speeds)
                summary = ", ".join(f"{column} {speed:.1f}" for column, speed in speeds.items())
                print(f"round {i + 1} of {options.rounds}: {engine.label}: {summary}", file=sys.stderr)
    medians = {label: _medians(rounds) for label, rounds in results.items() if rounds}
    if not medians:
        raise SystemExit("compare.py: error: every engine failed")
    _print_table(path.name, task, options.rounds, medians)
    if options.plot:
        _plot(options.plot, path.name, task, medians)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="GGUF file.")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="Number of threads (2).")
    parser.add_argument("--prefill", type=int, default=512, metavar="N", help="Prompt length in tokens (512).")
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="Tokens to decode per sequence (64).")
    parser.add_argument("--batch", default="8,16", metavar="N,N", help="Numbers of concurrent sequences (8,16).")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="Number of measurements per engine (3).")
    parser.add_argument(
        "--tier", action="append", metavar="TIER", help="phi-c's tier (the best); repeat it for several rows."
    )
    parser.add_argument("--only", action="append", choices=WORKERS, help="Measure only this engine; may be repeated.")
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="Python of one engine.")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="Python of all other engines (this one)."
    )
    parser.add_argument("--plot", metavar="FILE.png", help="Write the table as a bar chart (needs matplotlib).")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    return parser


def _work(name: str) -> None:
    """Measure one engine. The task is read as JSON from stdin, the result is the last line of stdout."""
    fields = json.load(sys.stdin)
    fields["n_seqs"] = tuple(fields["n_seqs"])
    result = WORKERS[name](Task(**fields))
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)  # does not wait for threads that an engine left running


def _engines(options: argparse.Namespace) -> Iterable[Engine]:
    """Yield the engines to measure; print how to install those that are missing."""
    pythons = dict(item.split("=", 1) for item in options.python)
    names = options.only or list(WORKERS)
    if "phi-c" in names:
        for tier in options.tier or [None]:
            label = f"phi-c ({tier})" if tier else "phi-c"
            yield Engine(label, "phi-c", pythons.get("phi-c", sys.executable), tier)
    for name, (module, install) in _PEERS.items():
        if name not in names:
            continue
        python = pythons.get(name, options.peer_python)
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        if _succeeds(python, "-c", probe):
            yield Engine(name, name, python)
        else:
            print(f"{name} is not installed: {install}")


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, check=False).returncode == 0
    except OSError:  # no such interpreter
        return False


def _measure(engine: Engine, task: Task) -> Speeds | None:
    """Return the speeds of one run; None if the engine failed, and the last line of its stderr is printed."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(task.n_threads), "OMP_NUM_THREADS": str(task.n_threads)}
    if engine.tier:
        environment["PHI_C_ISA"] = engine.tier
    done = subprocess.run(
        [engine.python, __file__, "--worker", engine.worker],
        input=json.dumps(asdict(task)),
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        print(f"{engine.label} failed: {lines[-1]}", file=sys.stderr)
        return None
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {
        f"prefill {task.n_prefill}": result["prefill"],
        "decode": result["decode"],
        **{f"batch {n}": speed for n, speed in result["batch"].items()},
    }


def _medians(rounds: list[Speeds]) -> Speeds:
    return {column: statistics.median(speeds[column] for speeds in rounds) for column in rounds[0]}


def _columns(medians: dict[str, Speeds]) -> list[str]:
    return list(dict.fromkeys(column for speeds in medians.values() for column in speeds))


def _print_table(name: str, task: Task, n_rounds: int, medians: dict[str, Speeds]) -> None:
    print(f"\n{name}, {task.n_threads} threads, {task.n_decode} tokens decoded per sequence;")
    print(f"tok/s, medians of {n_rounds} rounds; in brackets: phi-c's speed divided by the engine's\n")
    reference = next((speeds for label, speeds in medians.items() if label.startswith("phi-c")), None)
    columns = _columns(medians)
    print(f"| engine | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for label, speeds in medians.items():
        cells = []
        for column in columns:
            if column not in speeds:
                cells.append("-")
                continue
            is_peer = reference is not None and speeds is not reference
            ratio = f" ({reference[column] / speeds[column]:.2f})" if reference and is_peer else ""
            cells.append(f"{speeds[column]:.1f}{ratio}")
        print(f"| {label} | {' | '.join(cells)} |")


def _plot(file: str, name: str, task: Task, medians: dict[str, Speeds]) -> None:
    """Draw a bar chart for each column, with one bar per engine. Each chart has its own scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = _columns(medians)
    labels = list(medians)
    colours = ["#d1495b" if label.startswith("phi-c") else "#8d99ae" for label in labels]
    figure, axes = pyplot.subplots(1, len(columns), figsize=(3.2 * len(columns), 0.5 * len(labels) + 1.2), sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        bars = axis.barh(labels, [medians[label].get(column, math.nan) for label in labels], color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axis.set_title(column, fontsize=10)
        axis.margins(x=0.2)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_xticks([])
    axes[0].invert_yaxis()
    figure.suptitle(f"tok/s: {name}, {task.n_threads} threads", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
