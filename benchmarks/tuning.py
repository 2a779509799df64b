"""Measures run-time tuning: what it costs at load, and how close its choice is to the best candidate.

    python benchmarks/tuning.py MODEL [--threads 1,2] [--busy] [--tunings 3] [--rounds 8] [--json]

MODEL: path of a GGUF file. Cost: the time that a load spends on tuning, without a stored profile (cold) and with one
(warm), medians. Loss: decode with the settings of several independent tunings and with each candidate for all types
take turns, a pass each, in rounds; the loss is the median over rounds of the time of a tuning divided by that of the
candidate with the lowest median, minus 1. A negative loss means that a mixture of types beats each single candidate.

--busy keeps one core busy with another process, during tuning and decoding.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import phi_c
from phi_c import _core
from phi_c.model import tuning

N_COSTS = 5


@contextlib.contextmanager
def busy_core(is_busy: bool) -> Iterator[None]:
    """Run a process that spins on the last core that this process may use."""
    if not is_busy:
        yield
        return
    pin = ""
    if hasattr(os, "sched_getaffinity"):
        pin = f"os.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})"
    process = subprocess.Popen([sys.executable, "-c", f"import os\n{pin}\nwhile True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure_cost(model: _core.Model) -> tuple[float, float]:
    """Return the median time of tuning in ms, cold and warm."""
    cold, warm = [], []
    for _ in range(N_COSTS):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["PHI_C_CACHE"] = folder
            for times in (cold, warm):
                _core.set_tuning(model, _core.default_tuning())
                start = time.perf_counter()
                tuning.tune_model(model)
                times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(cold), statistics.median(warm)


def decode(model: _core.Model, kv: _core.KvCache, settings: _core.Tuning) -> float:
    """Return the time in seconds of a pass of one token."""
    _core.set_tuning(model, settings)
    zero = np.zeros(1, np.int32)
    start = time.perf_counter()
    _core.forward(model, kv, zero, zero, zero, [zero], [False], zero)
    return time.perf_counter() - start


def measure_loss(model: _core.Model, kv: _core.KvCache, n_tunings: int, n_rounds: int) -> dict[str, Any]:
    """Return the loss of each tuning against the best candidate, and the gain over the default."""
    default = _core.default_tuning()
    _core.set_tuning(model, default)
    settings = {f"tuning {i + 1}": _core.tune(model, tuning.BUDGET_SECONDS)[0] for i in range(n_tunings)}
    names = {}
    for each in _core.prefetch_candidates(1):
        name = f"L1 {each.l1_bytes}, L2 {each.l2_bytes}" + (", next page" if each.next_page else "")
        names[name] = default._replace(prefetch={t: (each, *rest[1:]) for t, rest in default.prefetch.items()})
    settings |= names
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for i in range(n_rounds):
        order = list(settings)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            seconds[name].append(decode(model, kv, settings[name]))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(names, key=lambda name: medians[name])

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    first = next(iter(names))  # the default
    return {
        "best": best,
        "losses": [round(ratio(f"tuning {i + 1}", best) - 1, 4) for i in range(n_tunings)],
        "gains_over_default": [round(ratio(first, f"tuning {i + 1}") - 1, 4) for i in range(n_tunings)],
        "worst_candidate_loss": round(max(ratio(name, best) for name in names) - 1, 4),
        "decode_ms": {name: round(median * 1e3, 2) for name, median in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--tunings", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ.pop("PHI_C_TUNE", None)
    for n_threads in map(int, arguments.threads.split(",")):
        os.environ["PHI_C_TUNE"] = "off"
        with phi_c.load(arguments.model, n_threads=n_threads, n_ctx=64) as loaded, busy_core(arguments.busy):
            del os.environ["PHI_C_TUNE"]
            model = loaded.engine.model
            cold, warm = measure_cost(model)
            report = measure_loss(model, loaded.engine.kv, arguments.tunings, arguments.rounds)
        report = {"threads": n_threads, "busy": arguments.busy, "cold_ms": cold, "warm_ms": warm, **report}
        if arguments.json:
            print(json.dumps(report), flush=True)
        else:
            print("\n".join(f"{name}: {value}" for name, value in report.items()), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
