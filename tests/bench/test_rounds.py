"""Kernel benchmarks in rounds: samples, figures, and the interval that is reported."""

from collections import defaultdict

import pytest

from phi_c.bench import rounds
from phi_c.bench.kernels import CACHE, MEMORY, Case, Kernel, Limit

PRODUCT = Kernel("matmul", "Q4_K", "avx2", 1, "16x256", CACHE)


class FakeLoop:
    """Takes a fixed time per call, and records the numbers of calls."""

    def __init__(self, seconds: float, log: list[str], name: str) -> None:
        self.per_call, self.n_calls, self.log, self.name = seconds, list[int](), log, name

    def seconds(self, n_calls: int) -> float:
        self.n_calls.append(n_calls)
        self.log.append(self.name)
        return n_calls * self.per_call


class FakeClock:
    rates: tuple[float, ...] = (2e9,)

    def __init__(self) -> None:
        self.rates = ()  # type: ignore[assignment]

    def measure(self) -> float:
        self.rates = (*self.rates, 2e9)
        return 2e9


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_Clock", FakeClock)


@pytest.mark.parametrize(("per_call", "n_calls"), [(1e-6, 3000), (1e-3, 3), (1.0, 1), (0.0, 1 << 24)])
def test_samples_last_some_milliseconds(per_call: float, n_calls: int) -> None:
    assert rounds.count_calls(FakeLoop(per_call, [], ""), 3e-3) == n_calls


def test_each_round_has_one_sample_of_every_kernel_in_another_order() -> None:
    log: list[str] = []
    loops = [FakeLoop(1e-3 * (i + 1), log, f"{i}") for i in range(6)]
    cases = [Case(Kernel("op", f"{i}", "", 1, "1", CACHE), loop) for i, loop in enumerate(loops)]
    report = rounds.measure(cases, n_samples=4)
    timed = log[-24:]
    orders = [timed[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(order) == list("012345") for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert report["n_samples"] == 4
    assert all(loop.n_calls[-4:] == [rounds.count_calls(loop, 3e-3)] * 4 for loop in loops)


def test_figures_of_a_product() -> None:
    reads = [Case(Limit("read", "0"), FakeLoop(1e-3, [], ""), n_bytes=10_000_000),
             Case(Limit("read", "4096"), FakeLoop(1e-3, [], ""), n_bytes=20_000_000)]  # fmt: skip
    multiply = Limit("multiply", "q8", "avx2")
    in_memory = Kernel("matmul", "Q4_K", "avx2", 1, "16x256", MEMORY)
    cases = [
        Case(PRODUCT, FakeLoop(2e-6, [], ""), 16_000, 100_000, multiply),
        Case(in_memory, FakeLoop(4e-6, [], ""), 16_000, 100_000, Limit("read")),
        *reads,
        Case(multiply, FakeLoop(1e-6, [], ""), n_macs=200_000),
    ]
    report = rounds.measure(cases, n_samples=3)
    cache, memory = report["kernels"]
    assert (cache["op"], cache["type"], cache["tier"], cache["data"]) == ("matmul", "Q4_K", "avx2", "cache")
    assert (cache["ns"], cache["cycles"], cache["gb_s"], cache["gmac_s"]) == (2000, 4000, 8, 50)
    assert (cache["limit"], cache["share"]) == ("multiply", 0.25)
    assert (memory["gb_s"], memory["limit"], memory["share"]) == (4, "read", 0.2)  # of the faster way to read
    assert (report["read_gb_s"], report["multiply_gmac_s"], report["clock_ghz"]) == (20, {"avx2": {"q8": 200}}, 2)
    assert memory["ns_high"] - 4000 > cache["ns_high"] - 2000 > 0  # equal samples: only the widening


def test_intervals_contain_those_of_the_samples() -> None:
    seconds = [1e-3, 1.0e-3, 1.1e-3, 1.2e-3, 1.3e-3, 1.3e-3, 1.4e-3, 1.5e-3]

    class Drifting(FakeLoop):
        def seconds(self, n_calls: int) -> float:
            super().seconds(n_calls)
            return n_calls * (seconds[len(self.n_calls) % len(seconds)])

    report = rounds.measure([Case(PRODUCT, Drifting(0, [], ""))], n_samples=len(seconds))
    row = report["kernels"][0]
    assert (row["ns_low"], row["ns"], row["ns_high"]) == (1e6, pytest.approx(1.25e6), 1.5e6)
    assert row["spread"] == pytest.approx(0.4)
    assert "1 of 1 intervals are wider than 15% of their median" in report["disturbed"]


def test_progress_names_what_is_measured() -> None:
    lines: dict[str, int] = defaultdict(int)

    def count(text: str) -> None:
        lines[text] += 1

    rounds.measure([Case(PRODUCT, FakeLoop(1e-3, [], ""))], n_samples=2, progress=count)
    assert list(lines) == [
        "warming up: matmul Q4_K avx2 1 tokens 16x256 cache",
        "round 1 of 2: 1 kernels",
        "round 2 of 2: 1 kernels",
    ]
