"""Timings: barriers as forward.c has them, times that add up to the duration of a call, logits with the same bits."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_helper import Runner

from phi_c import _core
from phi_c.errors import Cancelled
from tiny_gguf import write_tiny

TOKENS = [int(t) for t in np.random.default_rng(3).integers(3, 350, 75)]
N_LAYERS = 3
DENSE = {"embed": 1, "lm_head": 1} | dict.fromkeys(("qkv", "attention", "attn_output", "gate_up", "down"), N_LAYERS)
NORMS = {"norm": 2 * N_LAYERS + 1}


def barriers(timings: _core.Timings) -> dict[str, int]:
    return {phase: int(n) for phase, n in zip(_core.PHASES, timings.n_barriers, strict=True) if n}


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(
    ("architecture", "shape", "n_tokens", "expected"),
    [
        ("phi3", {}, 1, DENSE),  # with several threads, each computes the norms itself
        ("phi3", {}, 5, DENSE | NORMS),
        ("phi3", {"head_dim": 80, "rope_dims": 40, "n_kv_heads": 4}, 5, DENSE | NORMS | {"quantize": N_LAYERS}),
        ("phimoe", {}, 5, DENSE | NORMS | {"router": N_LAYERS, "gather": 2 * N_LAYERS}),
    ],
)
def test_barriers(
    tmp_path: Path, architecture: str, shape: dict[str, Any], n_tokens: int, expected: dict[str, int], n_threads: int
) -> None:
    path = write_tiny(tmp_path / "m.gguf", architecture, "Q8_0", n_layers=N_LAYERS, **shape)
    runner = Runner(path, tier="scalar", n_threads=n_threads)
    timings = _core.Timings(runner.model)
    runner.run(TOKENS[:n_tokens], timings=timings)
    if n_threads == 1:
        expected = expected | NORMS
    assert barriers(timings) == expected
    runner.run(TOKENS[:n_tokens], timings=timings)
    assert barriers(timings) == {phase: 2 * n for phase, n in expected.items()}
    assert timings.n_calls == 2


def test_barriers_of_the_observer(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf", n_layers=N_LAYERS))
    timings = _core.Timings(runner.model)
    runner.run(TOKENS, observer=_core.Observer(runner.model), timings=timings)
    assert barriers(timings)["observe"] == 4 * N_LAYERS


def test_phases_without_work_take_no_time(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"), n_threads=2)
    timings = _core.Timings(runner.model)
    runner.run(TOKENS[:1], timings=timings)
    assert timings.working.shape == timings.waiting.shape == (2, len(_core.PHASES))
    assert (timings.working >= 0).all() and (timings.waiting >= 0).all()
    used = {_core.PHASES[i] for i in np.flatnonzero(timings.working.sum(0))}
    assert used == {*DENSE, "start", "norm"}
    # A barrier is timed on every thread, and nothing else is waited for but the start.
    assert {_core.PHASES[i] for i in np.flatnonzero(timings.waiting.min(0))} <= set(DENSE)
    assert timings.waiting[0, _core.PHASES.index("start")] == 0 < timings.waiting[1, _core.PHASES.index("start")]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_times_add_up_to_the_call(tmp_path: Path, n_threads: int) -> None:
    """Never more than the call takes; and most of it, in the best of several calls."""
    runner = Runner(write_tiny(tmp_path / "m.gguf", n_layers=6), tier="scalar", n_threads=n_threads)
    timings = _core.Timings(runner.model)
    shares = []
    for _ in range(10):
        timings.clear()
        start = time.perf_counter()
        runner.run(TOKENS, timings=timings)
        seconds = time.perf_counter() - start
        shares.append((timings.working + timings.waiting).sum(1) / seconds)
    assert np.max(shares) <= 1
    assert np.max(np.min(shares, axis=1)) > 0.8


@pytest.mark.parametrize("n_threads", [1, 3])
def test_timings_do_not_change_logits(tmp_path: Path, n_threads: int) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"), n_threads=n_threads)
    timings = _core.Timings(runner.model)
    for n_tokens in (1, 7, len(TOKENS)):
        plain = runner.run(TOKENS[:n_tokens])
        assert np.array_equal(runner.run(TOKENS[:n_tokens], timings=timings), plain)
    assert timings.n_calls == 3


def test_cancelled_calls_are_not_counted(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"))
    timings, flag = _core.Timings(runner.model), _core.CancelFlag()
    flag.set()
    with pytest.raises(Cancelled):
        runner.run(TOKENS, cancel=flag, timings=timings)
    assert timings.n_calls == 0 and timings.working.any()
    timings.clear()
    assert not (timings.working.any() or timings.waiting.any() or timings.n_barriers.any())


def test_timings_of_another_model_raise(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="the timings belong to another model"):
        Runner(path).run(TOKENS, timings=_core.Timings(Runner(path).model))
