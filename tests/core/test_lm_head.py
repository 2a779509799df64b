"""Rows after the final norm, and the head as a call of its own: the bits of one forward pass, in any chunks."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from closeness import nmse
from forward_helper import Runner

from phi_c import _core
from phi_c.errors import ModelClosedError
from reference import Reference
from tiny_gguf import write_tiny

Floats = npt.NDArray[np.float32]
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 350, 70)]


def hidden_states(runner: Runner, rows: list[int]) -> Floats:
    n = len(TOKENS)
    arange = np.arange(n, dtype=np.int32)
    wanted = np.asarray(rows, np.int32)
    sequences = np.zeros(n, np.int32)
    table = [runner.table()]
    tokens = np.asarray(TOKENS, np.int32)
    return _core.forward(runner.model, runner.kv, tokens, arange, sequences, table, [False], wanted, None, None, True)


@pytest.mark.parametrize("tier", _core.tiers())
@pytest.mark.parametrize("weight_type", ["F32", "Q8_0", "Q4_K"])
def test_chunks_give_the_bits_of_one_pass(tmp_path: Path, weight_type: str, tier: str) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf", weight_type=weight_type), tier=tier)
    expected = runner.run(TOKENS)
    rows = hidden_states(runner, list(range(len(TOKENS))))
    few = _core.max_exact_batch(tier)
    # Tiers that round many tokens otherwise do so in chunks that are as large.
    for size in (32, 64) if few else (1, 3, 5, 32, 64, 70):
        starts = [s for s in range(0, len(TOKENS), size) if few is None or len(TOKENS) - s > few]
        for start in starts:
            chunk = rows[start : start + size]
            assert np.array_equal(_core.lm_head(runner.model, runner.kv, chunk), expected[start : start + size])


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_rows_are_the_references_states(tmp_path: Path, architecture: str) -> None:
    path = write_tiny(tmp_path / "m.gguf", architecture, "F32")
    expected = Reference(path).hidden_states(TOKENS)
    rows = hidden_states(Runner(path), list(range(len(TOKENS))))
    assert rows.shape == expected.shape
    assert nmse(rows, expected) <= 1e-6


def test_rows_in_any_order_and_number(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"))
    every = hidden_states(runner, list(range(len(TOKENS))))
    for rows in ([], [69], [5, 5, 0, 69], list(range(69, -1, -1)) * 2):
        assert np.array_equal(hidden_states(runner, rows), every[rows])


def test_what_the_head_refuses(tmp_path: Path) -> None:
    runner, other = (Runner(write_tiny(tmp_path / f"{i}.gguf")) for i in range(2))
    assert _core.lm_head(runner.model, runner.kv, np.empty((0, 256), np.float32)).shape == (0, runner.config.n_vocab)
    with pytest.raises(ValueError, match="rows of 255 values, expected 256"):
        _core.lm_head(runner.model, runner.kv, np.zeros((2, 255), np.float32))
    with pytest.raises(ValueError, match="belongs to another model"):
        _core.lm_head(runner.model, other.kv, np.zeros((2, 256), np.float32))
    runner.model.close()
    with pytest.raises(ModelClosedError):
        _core.lm_head(runner.model, runner.kv, np.zeros((2, 256), np.float32))
