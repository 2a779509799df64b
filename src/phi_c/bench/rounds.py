"""Measures kernels in rounds: each round has one sample of every kernel, in random order, so that drifts affect all.

A sample is as many calls as last some milliseconds. Before each sample the core's clock is measured, so that cycles do
not depend on how it varies.
"""

import importlib.metadata
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from phi_c import machine
from phi_c._core import ClockLoop
from phi_c.bench.disturbance import CpuMeter, find_disturbance
from phi_c.bench.kernels import MEMORY, SMALL_BATCH, Case, Kernel, Limit, Loop
from phi_c.bench.statistics import median_interval

N_SAMPLES = 15
_SAMPLE_S, _CLOCK_S = 3e-3, 2e-4
_MAX_CALLS = 1 << 24
# Runs differ by more than the samples of one run do: activations are stored elsewhere, and a virtual machine shares the
# last cache and the memory with others. Intervals extend to at least this share of the median on each side.
_MIN_HALF_WIDTH = 0.05
_MIN_HALF_WIDTH_SHARED = 0.12  # for weights in memory, and activations of many tokens, which exceed a core's own cache


@dataclass(frozen=True)
class Samples:
    """The samples of one kernel, in seconds and in cycles per call."""

    seconds: list[float]
    cycles: list[float]


def measure(
    cases: Sequence[Case], n_samples: int = N_SAMPLES, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Return the report of `phi-c bench --kernels`, ready for JSON.

    cases: kernels and their limits. progress: called with a line on what is measured.
    """
    clock = _Clock()
    n_calls = []
    for case in cases:
        progress(f"warming up: {case.name}")
        n_calls.append(count_calls(case.loop, _SAMPLE_S))
    samples = [Samples([], []) for _ in cases]
    order = list(range(len(cases)))
    shuffle = random.Random(0).shuffle  # noqa: S311 - no secret
    meter = CpuMeter()
    for i in range(n_samples):
        progress(f"round {i + 1} of {n_samples}: {len(cases)} kernels")
        shuffle(order)
        for k in order:
            hertz = clock.measure()
            seconds = cases[k].loop.seconds(n_calls[k]) / n_calls[k]
            samples[k].seconds.append(seconds)
            samples[k].cycles.append(seconds * hertz)
    return _report(cases, samples, clock.rates, meter)


def count_calls(loop: Loop, seconds: float) -> int:
    """Return the number of calls that last `seconds`, at least 1. The calls that this takes warm the kernel up."""
    n_calls = 1
    while True:
        took = loop.seconds(n_calls)
        if took >= seconds / 4 or n_calls >= _MAX_CALLS:
            return max(1, min(_MAX_CALLS, round(n_calls * seconds / max(took, 1e-9))))
        n_calls *= 4 if took < seconds / 16 else 2


class _Clock:
    """Measures the core's clock in Hz."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self._loop = ClockLoop()
        self._n_steps = count_calls(self._loop, _CLOCK_S)

    def measure(self) -> float:
        """Return the rate now."""
        self.rates.append(self._n_steps * ClockLoop.CYCLES / self._loop.seconds(self._n_steps))
        return self.rates[-1]


def _report(
    cases: Sequence[Case], samples: Sequence[Samples], clock_rates: list[float], meter: CpuMeter
) -> dict[str, Any]:
    limits = _limit_rates(cases, samples)
    rows = [
        _row(case, case.name, found, limits)
        for case, found in zip(cases, samples, strict=True)
        if isinstance(case.name, Kernel)
    ]
    read_rates = _fastest_reads(cases, samples)
    widths = [width for row in rows for width in [row.pop("width")] if width is not None]
    reads = limits.get(Limit("read"))
    multiplies: dict[str, dict[str, float]] = defaultdict(dict)
    for limit, rate in limits.items():
        if limit.name == "multiply":
            multiplies[limit.tier][limit.variant] = round(rate / 1e9, 2)
    return {
        "kernels": rows,
        "n_samples": len(samples[0].seconds),
        "disturbed": find_disturbance(meter.use(), clock_rates, read_rates, widths, len(machine.affinity_cpus())),
        "cpu": machine.cpu_name(),
        "clock_ghz": round(statistics.median(clock_rates) / 1e9, 3),
        "read_gb_s": None if reads is None else round(reads / 1e9, 2),
        "multiply_gmac_s": multiplies,
        "version": importlib.metadata.version("phi-c"),
    }


def _limit_rates(cases: Sequence[Case], samples: Sequence[Samples]) -> dict[Limit, float]:
    """Return the rates of the limits: bytes or multiply-accumulates per second. The fastest way to read counts."""
    rates: dict[Limit, float] = {}
    for case, found in zip(cases, samples, strict=True):
        if isinstance(case.name, Limit):
            limit = Limit("read") if case.name.name == "read" else case.name
            rate = (case.n_bytes or case.n_macs) / statistics.median(found.seconds)
            rates[limit] = max(rate, rates.get(limit, 0.0))
    return rates


def _fastest_reads(cases: Sequence[Case], samples: Sequence[Samples]) -> list[float]:
    """Return the samples, in bytes per second, of the fastest way to read."""
    reads = [
        [case.n_bytes / seconds for seconds in found.seconds]
        for case, found in zip(cases, samples, strict=True)
        if isinstance(case.name, Limit) and case.name.name == "read"
    ]
    return max(reads, key=statistics.median, default=[])


def _row(case: Case, kernel: Kernel, samples: Samples, limits: dict[Limit, float]) -> dict[str, Any]:
    median, low, high = median_interval(samples.seconds)
    is_shared = kernel.data == MEMORY or kernel.n_tokens > SMALL_BATCH
    half = (_MIN_HALF_WIDTH_SHARED if is_shared else _MIN_HALF_WIDTH) * median
    rate = (case.n_bytes if kernel.data == MEMORY else case.n_macs) / median
    return {
        "op": kernel.op,
        "type": kernel.type,
        "tier": kernel.tier,
        "n_tokens": kernel.n_tokens,
        "size": kernel.size,
        "data": kernel.data,
        "ns": _round(median * 1e9),
        "ns_low": _round(min(low, median - half) * 1e9),
        "ns_high": _round(max(high, median + half) * 1e9),
        "spread": round((max(samples.seconds) - min(samples.seconds)) / median, 4),
        "cycles": _round(statistics.median(samples.cycles)),
        "gb_s": _round(case.n_bytes / median / 1e9) if case.n_bytes else None,
        "gmac_s": _round(case.n_macs / median / 1e9) if case.n_macs else None,
        "limit": case.limit.name if case.limit else None,
        "share": round(rate / limits[case.limit], 4) if case.limit else None,
        "width": (high - low) / median,
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")
