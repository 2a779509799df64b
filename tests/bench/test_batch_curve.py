"""The curve of batch sizes: intervals, steps, and cliffs on synthetic speeds."""

import numpy as np

from phi_c.bench.batch_curve import chart, curve, steps

N_REPEATS = 9


def speeds(*medians: float, seed: int = 0) -> dict[int, list[float]]:
    """Return speeds of batches of 1, 2, ... sequences that rise and fall by 40 % together, and by 1 % alone."""
    rng = np.random.default_rng(seed)
    load = rng.uniform(0.6, 1.0, N_REPEATS)
    return {i + 1: list(m * load * rng.uniform(0.99, 1.01, N_REPEATS)) for i, m in enumerate(medians)}


def test_a_fall_is_a_cliff_however_loaded_the_machine_is() -> None:
    """Paired, a fall by 10 % shows, although the machine's speed varies by more."""
    found = steps(speeds(10, 19, 27, 24.3, 31))
    assert [(step["from"], step["to"]) for step in found] == [(1, 2), (2, 3), (3, 4), (4, 5)]
    assert [step["cliff"] for step in found] == [False, False, True, False]
    assert found[2]["low"] <= 0.9 <= found[2]["high"] < 1
    assert all(step["low"] <= step["ratio"] <= step["high"] for step in found)


def test_equal_speeds_are_not_a_cliff() -> None:
    assert [steps(speeds(20, 20, seed=seed))[0]["cliff"] for seed in range(5)] == [False] * 5


def test_sizes_are_compared_with_the_next_smaller_one() -> None:
    samples = {16: [30.0, 31.0], 1: [10.0, 10.0], 4: [40.0, 40.0]}
    assert [row["n_seqs"] for row in curve(samples)] == [16, 1, 4]
    assert [(step["from"], step["to"], step["ratio"], step["cliff"]) for step in steps(samples)] == [
        (1, 4, 4.0, False),
        (4, 16, 0.7625, True),
    ]
    assert steps({8: [1.0]}) == []


def test_medians_and_intervals() -> None:
    assert curve({3: [5.0, 1.0, 3.0]}) == [{"n_seqs": 3, "tok_s": 3.0, "tok_s_low": 1.0, "tok_s_high": 5.0}]


def test_chart() -> None:
    """A line for each size; bars are proportional to the speed."""
    samples = {1: [10.0], 2: [20.0], 3: [15.0]}
    lines = chart(curve(samples), steps(samples)).splitlines()
    assert len(lines) == 4
    assert [line.count("#") for line in lines] == [0, 20, 40, 30]
    assert [line.endswith("cliff") for line in lines] == [False, False, False, True]
    assert lines[2].split()[:2] == ["2", "20.00"] and "2.000 (2.000 to 2.000)" in lines[2]
    assert max(map(len, lines)) <= 120
