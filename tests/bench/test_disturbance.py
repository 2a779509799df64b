"""The rule by which a benchmark reports that it was disturbed, on synthetic samples."""

import time

import pytest

from phi_c import machine
from phi_c.bench.disturbance import CpuMeter, CpuUse, find_disturbance

QUIET = CpuUse(0.05, 0.0)
STEADY = [3.0e9, 3.01e9, 3.02e9, 3.0e9]


def disturbance(use: CpuUse = QUIET, clock: list[float] = STEADY, reads: list[float] = STEADY,
                widths: tuple[float, ...] = (0.01,) * 20, n_cpus: int = 2) -> str | None:  # fmt: skip
    return find_disturbance(use, clock, reads, widths, n_cpus)


def test_quiet_run() -> None:
    assert disturbance() is None
    assert disturbance(CpuUse(None, None), reads=[]) is None  # a system that reports neither


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (CpuUse(1.0, 0.0), "other processes used 1.00 cores"),
        (CpuUse(0.0, 0.3), "other virtual machines took 0.30 cores"),
        (CpuUse(0.9, 0.1), "other processes used 0.90 cores; other virtual machines took 0.10 cores"),
    ],
)
def test_busy_machine(use: CpuUse, reason: str) -> None:
    assert disturbance(use) == reason


def test_a_busy_core_of_many_does_not_count() -> None:
    assert disturbance(CpuUse(1.0, 0.0), n_cpus=64) is None


def test_varying_rates() -> None:
    """Quartiles count: a single slow sample, as of an interrupt, does not."""
    assert disturbance(clock=[3e9, 3e9, 1e9, 3e9, 3e9, 3e9]) is None
    assert disturbance(clock=[3e9, 2.5e9] * 4) == "the clock varied from 2.50 to 3.00 GHz"
    assert disturbance(reads=[30e9, 15e9] * 4) == "the read rate varied from 15.00 to 30.00 GB/s"


def test_wide_intervals() -> None:
    assert disturbance(widths=(0.5,) + (0.01,) * 19) is None
    reason = "2 of 20 intervals are wider than 15% of their median"
    assert disturbance(widths=(0.5,) * 2 + (0.01,) * 18) == reason


def test_meter_subtracts_the_process_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"wall": 10.0, "own": 5.0, "all": (100.0, 1.0)}
    monkeypatch.setattr(time, "perf_counter", lambda: times["wall"])
    monkeypatch.setattr(time, "process_time", lambda: times["own"])
    monkeypatch.setattr(machine, "cpu_seconds", lambda: times["all"])
    meter = CpuMeter()
    times |= {"wall": 14.0, "own": 9.0, "all": (110.0, 1.2)}
    use = meter.use()
    assert use.other == pytest.approx(1.5) and use.stolen == pytest.approx(0.05)  # (10 - 4) / 4, 0.2 / 4


def test_meter_without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_seconds", lambda: None)
    assert CpuMeter().use() == CpuUse(None, None)
