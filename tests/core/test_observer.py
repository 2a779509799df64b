"""Observer: sums of squared activations, against the inputs of the matrices in the NumPy reference."""

from pathlib import Path

import numpy as np
import pytest
from closeness import may_round_differently, nmse
from forward_helper import Runner

from exhaustive import mostly_exhaustive
from phi_c import _core
from phi_c.errors import Cancelled
from reference import Reference
from tiny_gguf import write_tiny

TOKENS = [int(t) for t in np.random.default_rng(2).integers(3, 350, 75)]
ARRAYS = ("attn_in", "attn_out", "ffn_in", "ffn_inner", "output")
# The matrices whose input each array sums, in files with and without fused matrices.
MATRICES = {
    "phi3": {"attn_in": ["attn_qkv"], "attn_out": ["attn_output"], "ffn_in": ["ffn_up"], "ffn_inner": ["ffn_down"]},
    "llama": {
        "attn_in": ["attn_q", "attn_k", "attn_v"],
        "attn_out": ["attn_output"],
        "ffn_in": ["ffn_gate", "ffn_up"],
        "ffn_inner": ["ffn_down"],
    },
}
SHAPES = {
    "plain": {},
    "head size 96": {"head_dim": 96, "rope_dims": 96},
    "multi-query attention, partial rotary": {"head_dim": 80, "rope_dims": 40, "n_kv_heads": 1},
    "columns that are not whole tasks": {"n_embd": 288, "n_ffn": 416},
    "tied output": {"tied": True, "n_layers": 3},
}


def observed(runner: Runner, n_batch: int, observer: _core.Observer | None = None) -> _core.Observer:
    """Run TOKENS in batches of n_batch tokens; return the observer."""
    observer = observer or _core.Observer(runner.model, output=True)
    for start in range(0, len(TOKENS), n_batch):
        runner.run(TOKENS[start : start + n_batch], start, observer=observer)
    return observer


@pytest.mark.parametrize("tier", _core.tiers())
@pytest.mark.parametrize("weight_type", ["F32", "Q4_0"])
@pytest.mark.parametrize("architecture", mostly_exhaustive(["phi3", "llama"], keep={"phi3"}))
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_squares(tmp_path: Path, shape: str, architecture: str, weight_type: str, tier: str) -> None:
    path = write_tiny(tmp_path / "m.gguf", architecture, weight_type, **SHAPES[shape])
    reference = Reference(path)
    reference.logits(TOKENS)
    observer = observed(Runner(path, tier=tier), len(TOKENS))
    assert observer.n_tokens == len(TOKENS)
    expected = {name: (x.astype(np.float64) ** 2).sum(0) for name, x in reference.inputs.items()}
    limit = 1e-6 if weight_type == "F32" else 5e-4  # keys and values are stored in half precision
    for array, matrices in MATRICES[architecture].items():
        for layer, sums in enumerate(getattr(observer, array)):
            for name in matrices:
                assert nmse(sums, expected[f"blk.{layer}.{name}.weight"]) <= limit, (array, layer)
    output = expected["token_embd.weight" if SHAPES[shape].get("tied") else "output.weight"]
    assert observer.output is not None
    assert nmse(observer.output, output) <= limit
    # The first input depends on no product, so it has the precision of float32 for quantised weights too.
    first = expected[f"blk.0.{MATRICES[architecture]['attn_in'][0]}.weight"]
    np.testing.assert_allclose(observer.attn_in[0], first, rtol=2e-6)


@pytest.mark.parametrize("tier", _core.tiers())
@pytest.mark.parametrize("weight_type", mostly_exhaustive(["F16", "Q4_K"], keep={"Q4_K"}))
def test_threads_and_batches_do_not_change_bits(tmp_path: Path, weight_type: str, tier: str) -> None:
    path = write_tiny(tmp_path / "m.gguf", "phi3", weight_type, n_ffn=768)
    base = observed(Runner(path, tier=tier, n_threads=1), 1)
    assert base.attn_in.all() and base.ffn_inner.all()
    for n_threads in (1, 2, 5):
        runner = Runner(path, tier=tier, n_threads=n_threads)
        for n_batch in (1, 4, 5, 16, 33, len(TOKENS)):
            observer = observed(runner, n_batch)
            for array in ARRAYS:
                got, expected = getattr(observer, array), getattr(base, array)
                if may_round_differently(tier, n_batch):
                    assert nmse(got, expected) <= 1e-3
                else:
                    assert np.array_equal(got, expected), (n_threads, n_batch, array)


def test_observer_does_not_change_logits(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"))
    plain = runner.run(TOKENS)
    for output in (False, True):
        observer = _core.Observer(runner.model, output=output)
        assert np.array_equal(runner.run(TOKENS, observer=observer), plain)
        assert (observer.output is not None) == output


def test_sums_accumulate_until_cleared(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"))
    observer = observed(runner, 20)
    once = {array: getattr(observer, array).copy() for array in ARRAYS}
    observed(runner, 20, observer)
    assert observer.n_tokens == 2 * len(TOKENS)
    for array in ARRAYS:
        np.testing.assert_allclose(getattr(observer, array), 2 * once[array], rtol=1e-12)
    flag = _core.CancelFlag()
    flag.set()
    with pytest.raises(Cancelled):
        runner.run(TOKENS, cancel=flag, observer=observer)
    assert observer.n_tokens == 2 * len(TOKENS)
    observer.clear()
    assert observer.n_tokens == 0
    observed(runner, 20, observer)
    assert all(np.array_equal(getattr(observer, array), once[array]) for array in ARRAYS)


def test_observer_of_another_model_raises(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="the observer belongs to another model"):
        Runner(path).run(TOKENS, observer=_core.Observer(Runner(path).model))
