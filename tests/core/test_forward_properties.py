"""A token's logits depend on its sequence only: the same bits token by token, in chunks, in a batch, after a rewind.

On tiers with a limit (`_core.max_exact_batch`) this holds for batches of at most as many tokens; larger ones are
compared by NMSE.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closeness import may_round_differently, median_nmse, nmse
from forward_helper import Floats, Runner

from phi_c import _core
from phi_c.errors import Cancelled, ModelClosedError
from tiny_gguf import write_tiny

TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 350, 75)]

CASES = [
    pytest.param(
        *(architecture, weight_type, tier, kv),
        id=f"{architecture}-{weight_type}-{tier}-{kv}",
        marks=() if architecture == "phi3" or weight_type == "Q4_K" else pytest.mark.exhaustive,
    )
    for architecture in ("phi3", "llama", "phi2", "phimoe")
    for weight_type in ("F16", "Q4_0", "Q8_0", "Q4_K", "Q6_K")
    for tier in _core.tiers()
    for kv in _core.KV_TYPES
    if (kv == "f16" or weight_type == "Q4_K") and (architecture in ("phi3", "llama") or weight_type in ("F16", "Q4_K"))
]


@pytest.fixture
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    architecture, weight_type, tier, kv_type = request.param
    overrides = {"window": 40} if architecture == "phi3" else {}
    path = write_tiny(tmp_path / "m.gguf", architecture, weight_type, **overrides)
    return Runner(path, tier=tier, kv_type=kv_type)


def each(cases: list[Any]) -> pytest.MarkDecorator:
    params = [pytest.param(case.values, id=case.id, marks=case.marks) for case in cases]
    return pytest.mark.parametrize("runner", params, indirect=True)


def in_chunks(runner: Runner, size: int, table_seed: int = 0) -> Floats:
    """Return the logits of TOKENS, computed in chunks of `size` tokens."""
    table = runner.table(seed=table_seed)
    return np.concatenate([runner.run(TOKENS[i : i + size], i, table=table) for i in range(0, len(TOKENS), size)])


def assert_same(runner: Runner, got: Floats, expected: Floats, largest_batch: int) -> None:
    """Compare bit for bit, or by NMSE if one of the two was computed in batches that may round differently."""
    if may_round_differently(runner.model.tier, largest_batch):
        # A near tie between experts may be decided differently in some rows.
        error = median_nmse if runner.config.n_experts else nmse
        assert error(got, expected) <= 1e-3
    else:
        assert np.array_equal(got, expected)


@each(CASES)
def test_prefill_equals_token_by_token(runner: Runner) -> None:
    single = in_chunks(runner, 1, table_seed=7)
    size = _core.max_exact_batch(runner.model.tier) or len(TOKENS)
    assert_same(runner, in_chunks(runner, size), single, size)
    assert_same(runner, runner.run(TOKENS), single, len(TOKENS))


@each(CASES)
def test_chunked_prefill_equals_whole_prefill(runner: Runner) -> None:
    single, whole = in_chunks(runner, 1), runner.run(TOKENS)
    for size in (2, 7, 16, 32, 33):
        parts = in_chunks(runner, size, table_seed=size)
        assert_same(runner, parts, single, size)
        assert_same(runner, parts, whole, len(TOKENS))


@each(CASES)
def test_recomputing_positions_after_a_rewind(runner: Runner) -> None:
    whole = runner.run(TOKENS)
    runner.run([5, 6, 7, 8], 40)
    # 75 and 35 tokens: both are above max_exact_batch (16) on tiers that have it.
    assert np.array_equal(runner.run(TOKENS[40:], 40), whole[40:])


@each(CASES)
def test_batch_of_sequences_equals_each_alone(runner: Runner) -> None:
    """Three sequences of different lengths; one continues after 50 cached positions."""
    sequences = [TOKENS[:30], TOKENS[10:75], [9, 8, 7]]
    tables = [runner.table(seed=s, start=20 * s, end=20 * s + 20) for s in range(3)]
    alone = [runner.run(tokens, table=table) for tokens, table in zip(sequences, tables, strict=True)]
    runner.run(sequences[1][:50], table=tables[1])
    parts = [(0, sequences[0]), (50, sequences[1][50:]), (0, sequences[2])]
    n = sum(len(part) for _, part in parts)
    together = _core.forward(
        runner.model,
        runner.kv,
        np.concatenate([np.asarray(part, np.int32) for _, part in parts]),
        np.concatenate([np.arange(start, start + len(part), dtype=np.int32) for start, part in parts]),
        np.repeat(np.arange(3, dtype=np.int32), [len(part) for _, part in parts]),
        tables,
        [False] * 3,
        np.arange(n, dtype=np.int32),
    )
    expected = [alone[0], alone[1][50:], alone[2]]
    assert_same(runner, together, np.concatenate(expected), max(n, 65))


def test_number_of_threads_does_not_change_bits(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", weight_type="Q4_K")
    results = [Runner(path, n_threads=n).run(TOKENS) for n in (1, 2, 3, 5)]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_logit_rows_select_tokens(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"))
    whole = runner.run(TOKENS)
    n = len(TOKENS)
    positions, zeros = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    tokens = np.asarray(TOKENS, np.int32)
    for rows in ([n - 1], [3, 0, 3], []):
        wanted = np.asarray(rows, np.int32)
        arguments = (tokens, positions, zeros, [runner.table()], [False], wanted)
        assert np.array_equal(_core.forward(runner.model, runner.kv, *arguments), whole[rows])


def test_cancel(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf", n_layers=6))
    whole = runner.run(TOKENS)
    flag = _core.CancelFlag()
    flag.set()
    with pytest.raises(Cancelled):
        runner.run(TOKENS, cancel=flag)
    flag.clear()
    assert np.array_equal(runner.run(TOKENS, cancel=flag), whole)


def test_closed_model_raises(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"))
    runner.model.close()
    runner.model.close()
    with pytest.raises(ModelClosedError):
        runner.run(TOKENS)


OUT_OF_RANGE = {
    "a token id": ([350 * 350], [0], [0], [0]),
    "a sequence id": ([1], [0], [1], [0]),
    "a logit row": ([1], [0], [0], [1]),
    "position": ([1], [32 * 64], [0], [0]),
}


@pytest.mark.parametrize("what", OUT_OF_RANGE)
def test_indices_out_of_range_raise(tmp_path: Path, what: str) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"))
    tokens, positions, sequences, rows = (np.asarray(values, np.int32) for values in OUT_OF_RANGE[what])
    with pytest.raises(ValueError, match=what):
        _core.forward(runner.model, runner.kv, tokens, positions, sequences, [runner.table()], [False], rows)
    with pytest.raises(ValueError, match="a page number"):
        runner.run([1], table=np.asarray([64], np.int32))
