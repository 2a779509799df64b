"""Whether something else disturbed a benchmark: other processes, stolen time, a varying clock, or wide intervals."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phi_c import machine

_MAX_OTHER_CORES = 0.2
_MAX_OTHER_SHARE = 0.05  # of all CPUs, for machines of many
_MAX_STOLEN_CORES = 0.02
_MAX_CLOCK_VARIATION = 0.05  # between the quartiles of its samples
_MAX_READ_VARIATION = 0.15  # the same of the read rate
_MAX_WIDTH = 0.15  # of an interval, as a share of the median
_MAX_WIDE = 0.05  # share of all intervals that may be wider


@dataclass(frozen=True)
class CpuUse:
    """CPU use during a run, in cores; None: the system does not report it."""

    other: float | None  # of other processes and the kernel
    stolen: float | None  # of other virtual machines


class CpuMeter:
    """Measures the CPU use from its creation on."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time(), machine.cpu_seconds()

    def use(self) -> CpuUse:
        """Return the use so far."""
        start, own_start, all_start = self._start
        seconds = time.perf_counter() - start
        all_now, own = machine.cpu_seconds(), time.process_time() - own_start
        if all_start is None or all_now is None or seconds <= 0:
            return CpuUse(None, None)
        other = max(0.0, all_now[0] - all_start[0] - own)
        return CpuUse(other / seconds, (all_now[1] - all_start[1]) / seconds)


def find_disturbance(
    use: CpuUse, clock_rates: Sequence[float], read_rates: Sequence[float], widths: Sequence[float], n_cpus: int
) -> str | None:
    """Return what disturbed a run, in words; None: nothing was noticed.

    clock_rates: samples in Hz. read_rates: samples in bytes per second; may be empty. widths: of each kernel's interval
    before it is widened, as a share of its median.
    """
    reasons = []
    if use.other is not None and use.other > max(_MAX_OTHER_CORES, _MAX_OTHER_SHARE * n_cpus):
        reasons.append(f"other processes used {use.other:.2f} cores")
    if use.stolen is not None and use.stolen > _MAX_STOLEN_CORES:
        reasons.append(f"other virtual machines took {use.stolen:.2f} cores")
    for what, unit, rates, allowed in (
        ("clock", "GHz", clock_rates, _MAX_CLOCK_VARIATION),
        ("read rate", "GB/s", read_rates, _MAX_READ_VARIATION),
    ):
        if not rates:
            continue
        low, high = (float(x) for x in np.quantile(rates, (0.25, 0.75)))
        if high > low * (1 + allowed):
            reasons.append(f"the {what} varied from {low / 1e9:.2f} to {high / 1e9:.2f} {unit}")
    n_wide = sum(width > _MAX_WIDTH for width in widths)
    if n_wide > _MAX_WIDE * len(widths):
        reasons.append(f"{n_wide} of {len(widths)} intervals are wider than {_MAX_WIDTH:.0%} of their median")
    return "; ".join(reasons) or None
