"""Hidden states of `forward`, and `lm_head` on them: the bits of one forward pass, in any chunks."""

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
def test_lm_head_in_chunks_equals_one_forward_pass(tmp_path: Path, weight_type: str, tier: str) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf", weight_type=weight_type), tier=tier)
    expected = runner.run(TOKENS)
    states = hidden_states(runner, list(range(len(TOKENS))))
    max_exact_batch = _core.max_exact_batch(tier)
    # On tiers with max_exact_batch, chunks must be above it, as the forward pass is.
    for size in (32, 64) if max_exact_batch else (1, 3, 5, 32, 64, 70):
        starts = [s for s in range(0, len(TOKENS), size) if len(TOKENS) - s > (max_exact_batch or 0)]
        for start in starts:
            chunk = states[start : start + size]
            assert np.array_equal(_core.lm_head(runner.model, runner.kv, chunk), expected[start : start + size])


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_hidden_states_against_reference(tmp_path: Path, architecture: str) -> None:
    path = write_tiny(tmp_path / "m.gguf", architecture, "F32")
    expected = Reference(path).hidden_states(TOKENS)
    got = hidden_states(Runner(path), list(range(len(TOKENS))))
    assert got.shape == expected.shape
    assert nmse(got, expected) <= 1e-6


def test_logit_rows_in_any_order_and_number(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"))
    every = hidden_states(runner, list(range(len(TOKENS))))
    for rows in ([], [69], [5, 5, 0, 69], list(range(69, -1, -1)) * 2):
        assert np.array_equal(hidden_states(runner, rows), every[rows])


def test_invalid_arguments_of_lm_head_raise(tmp_path: Path) -> None:
    runner, other = (Runner(write_tiny(tmp_path / f"{i}.gguf")) for i in range(2))
    assert _core.lm_head(runner.model, runner.kv, np.empty((0, 256), np.float32)).shape == (0, runner.config.n_vocab)
    with pytest.raises(ValueError, match="hidden states have 255 columns, expected 256"):
        _core.lm_head(runner.model, runner.kv, np.zeros((2, 255), np.float32))
    with pytest.raises(ValueError, match="belongs to another model"):
        _core.lm_head(runner.model, other.kv, np.zeros((2, 256), np.float32))
    runner.model.close()
    with pytest.raises(ModelClosedError):
        _core.lm_head(runner.model, runner.kv, np.zeros((2, 256), np.float32))
