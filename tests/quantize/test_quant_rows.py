"""Quantised rows: valid blocks, finite values, and errors compared with plain rounding and with the optimum."""

import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import (
    DISTRIBUTIONS,
    K_QUANTS,
    LEGACY,
    N_COLS,
    QUANTISED,
    TYPES,
    error_of,
    importance,
    make,
    quantized,
    values_of,
)

import gguf
from phi_c import _core

Floats = npt.NDArray[np.float32]

# Upper limits of RMSE / standard deviation for Gaussian weights: 1.01 times the measured values.
GAUSSIAN = {
    "Q8_0": 0.00529,
    "Q6_K": 0.01702,
    "Q5_K": 0.03515,
    "Q5_1": 0.03413,
    "Q5_0": 0.04050,
    "Q4_K": 0.07103,
    "Q4_1": 0.07045,
    "Q4_0": 0.08200,
    "Q3_K": 0.14539,
    "Q2_K": 0.26683,
}


@pytest.mark.parametrize("name", QUANTISED)
def test_blocks_dequantise_as_in_the_gguf_package(name: str) -> None:
    for distribution in DISTRIBUTIONS:
        blocks = quantized(name, make(distribution))
        for row in blocks[:4]:
            ours = _core.dequantize(TYPES[name].type_id, row, N_COLS, "scalar")
            np.testing.assert_array_equal(ours, values_of(name, row), err_msg=distribution)


@pytest.mark.parametrize("name", QUANTISED)
def test_error_of_gaussian_weights(name: str) -> None:
    rows = make("gaussian")
    rmse = (error_of(name, quantized(name, rows), rows) / (rows.astype(np.float64) ** 2).sum()) ** 0.5
    assert rmse <= GAUSSIAN[name]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", LEGACY)
def test_errors_are_no_larger_than_those_of_the_gguf_package(name: str, distribution: str, weighted: bool) -> None:
    """The gguf package scales each block by its range; our search starts from that and improves on it."""
    rows, weights = make(distribution), importance() if weighted else None
    plain = gguf.quants.quantize(rows, GGMLQuantizationType[name])
    assert error_of(name, quantized(name, rows, weights), rows, weights) <= error_of(name, plain, rows, weights)


def plain_k_error(name: str, rows: Floats, weights: Floats | None) -> float:
    """Return the error of K-quants without a search: scales from the range of each sub-block, rounded once."""
    n, n_quants, n_codes = {"Q2_K": (16, 3, 15), "Q4_K": (32, 15, 63), "Q5_K": (32, 31, 63)}.get(name, (16, 0, 0))
    x = rows.astype(np.float64).reshape(-1, 256 // n, n)
    if n_quants:
        low, high = np.minimum(x.min(-1), 0), x.max(-1)
        scale, low = np.maximum(high - low, 0) / n_quants, -low
        d, dmin = (as_float16(v.max(-1, keepdims=True) / n_codes) for v in (scale, low))
        scale, low = (u * np.clip(np.rint(divide(v, u)), 0, n_codes) for v, u in ((scale, d), (low, dmin)))
        q = np.clip(np.rint(divide(x + low[..., None], scale[..., None])), 0, n_quants)
        values = q * scale[..., None] - low[..., None]
    else:
        half, n_codes = {"Q3_K": (4, 32), "Q6_K": (32, 128)}[name]
        scale = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0] / -half
        extreme = np.take_along_axis(scale, np.abs(scale).argmax(-1)[..., None], -1)
        d = as_float16(extreme / -n_codes)
        scale = d * np.clip(np.rint(divide(scale, d)), -n_codes, n_codes - 1)
        values = np.clip(np.rint(divide(x, scale[..., None])), -half, half - 1) * scale[..., None]
    squares = (x - values).reshape(rows.shape) ** 2
    return float(squares.sum() if weights is None else (squares * weights).sum())


def as_float16(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.clip(values, -65504, 65504).astype(np.float16).astype(np.float64)


def divide(x: npt.NDArray[np.float64], by: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.divide(x, by, out=np.zeros(np.broadcast_shapes(x.shape, by.shape)), where=by != 0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", K_QUANTS)
def test_k_quant_errors_are_no_larger_than_without_a_search(name: str, distribution: str, weighted: bool) -> None:
    rows, weights = make(distribution), importance() if weighted else None
    assert error_of(name, quantized(name, rows, weights), rows, weights) <= plain_k_error(name, rows, weights)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("distribution", ["gaussian", "heavy tails", "outlier channels"])
def test_importance_lowers_the_weighted_error(name: str, distribution: str) -> None:
    rows, weights = make(distribution), importance()
    with_importance = error_of(name, quantized(name, rows, weights), rows, weights)
    without = error_of(name, quantized(name, rows), rows, weights)
    assert with_importance < (0.99 if name == "Q8_0" else 0.95) * without


@pytest.mark.parametrize(
    ("name", "max_quant", "weighted", "tolerance"),
    [
        ("Q4_0", 8, False, 1e-4),
        ("Q4_0", 8, True, 0.005),
        ("Q5_0", 16, False, 0.002),
        ("Q5_0", 16, True, 0.02),
        ("Q8_0", 127, False, 0.15),  # Q8_0 has no search for the scale
    ],
)
def test_errors_are_close_to_the_optimum(name: str, max_quant: int, weighted: bool, tolerance: float) -> None:
    """The optimum is found by trying every float16 scale for 24 blocks."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(12, 32)), rng.standard_t(2, (12, 32))]).astype(np.float32)
    weights = importance(32) if weighted else None
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    scales = np.concatenate([halves, -halves])
    scales = scales[(np.abs(scales) > 1e-4) & (np.abs(scales) < 10), None]
    best = 0.0
    for row in x:
        quants = np.clip(np.rint(row / scales), -max_quant, max_quant if name == "Q8_0" else max_quant - 1)
        squares = (row.astype(np.float64) - scales * quants) ** 2
        best += float((squares if weights is None else squares * weights).sum(1).min())
    ours = error_of(name, quantized(name, x, weights), x, weights)
    assert best * (1 - 1e-6) <= ours <= best * (1 + tolerance)


@pytest.mark.parametrize("name", list(TYPES))
def test_threads_do_not_change_the_bytes(name: str) -> None:
    rows, weights = make("heavy tails"), importance()
    alone = quantized(name, rows, weights)
    for n_threads in (2, 3, 7):
        np.testing.assert_array_equal(quantized(name, rows, weights, n_threads), alone)


@pytest.mark.parametrize("name", list(TYPES))
def test_blocks_are_independent_of_each_other(name: str) -> None:
    rows, weights = (
        make("blocks of all magnitudes"),
        importance() * np.repeat(10.0 ** np.arange(-32, 32), 32).astype(np.float32),
    )
    whole = quantized(name, rows, weights)
    np.testing.assert_array_equal(quantized(name, rows[3:5].copy(), weights), whole[3:5])
    kind = TYPES[name]
    step = max(kind.block_elements, 32)
    for n_blocks in (1, 2, 3):  # fewer blocks of 32 than a vector of 8 lanes
        part = np.ascontiguousarray(rows[:, : n_blocks * step])
        n_bytes = n_blocks * step // kind.block_elements * kind.block_bytes
        np.testing.assert_array_equal(quantized(name, part, weights[: n_blocks * step]), whole[:, :n_bytes])


@pytest.mark.parametrize("name", list(TYPES))
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-12, 1e12, 1e30, 3.4e38])
def test_finite_weights_stay_finite(name: str, size: float) -> None:
    rng = np.random.default_rng(2)
    rows = (rng.uniform(-1, 1, (4, 512)) * size).astype(np.float32)
    rows[0, :] = size
    rows[1, ::2] = -np.float32(size)
    rows[2, 5] = 0
    for weights in (None, importance(512), np.full(512, 3e38, np.float32), np.full(512, 1e-45, np.float32)):
        values = values_of(name, quantized(name, rows, weights))
        assert np.isfinite(values).all()
        if size < 1e30:  # larger weights can exceed the range of a float16 scale
            assert np.abs(values).max() <= 2.1 * size + 1e-6


@pytest.mark.parametrize("name", list(TYPES))
def test_zeros_stay_zeros(name: str) -> None:
    rows = np.zeros((3, 512), np.float32)
    rows[1, 300] = 1.0
    values = values_of(name, quantized(name, rows))
    assert not values[0].any() and not values[2].any() and not values[1, :256].any()


@pytest.mark.parametrize("name", QUANTISED)
def test_zero_importance(name: str) -> None:
    """All zeros have the effect of no importance; zeros in half of the columns lower the weighted error."""
    rows, weights = make("heavy tails"), importance()
    weights[::2] = 0
    np.testing.assert_array_equal(quantized(name, rows, np.zeros(N_COLS, np.float32)), quantized(name, rows))
    some = error_of(name, quantized(name, rows, weights), rows, weights)
    assert some <= error_of(name, quantized(name, rows), rows, weights)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(QUANTISED),
    seed=st.integers(0, 2**32 - 1),
    exponents=st.tuples(st.integers(-44, 38), st.integers(-44, 38)),
    weighted=st.booleans(),
)
def test_any_magnitudes(name: str, seed: int, exponents: tuple[int, int], weighted: bool) -> None:
    """Blocks of weights of very different magnitudes are valid, with an error no larger than that of zeros."""
    rng = np.random.default_rng(seed)
    low, high = sorted(exponents)
    rows = (rng.choice([-1, 1], (2, 512)) * 10.0 ** rng.uniform(low, high, (2, 512))).astype(np.float32)
    weights = importance(512, seed=seed) if weighted else None
    blocks = quantized(name, rows, weights)
    values = values_of(name, blocks)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(_core.dequantize(TYPES[name].type_id, blocks[0], 512), values[0])
    squares = rows.astype(np.float64) ** 2
    zeros = float(squares.sum() if weights is None else (squares * weights).sum())
    assert error_of(name, blocks, rows, weights) <= zeros * (1 + 1e-5)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_floats_are_rounded_to_nearest(name: str) -> None:
    rows = np.concatenate([make("heavy tails")[:4], make("tiny")[:4], make("large")[:4]])
    expected = (
        rows.astype(np.float16).view(np.uint8)
        if name == "F16"
        else gguf.quants.quantize(rows, GGMLQuantizationType.BF16)
    )
    np.testing.assert_array_equal(quantized(name, rows), expected)


def test_bad_arguments() -> None:
    rows = np.zeros((2, 256), np.float32)
    with pytest.raises(ValueError, match="importance of 255 columns, expected 256"):
        _core.quantize_rows(12, rows, np.zeros(255, np.float32))
    with pytest.raises(ValueError, match="2 x 128 is not a shape of type Q4_K"):
        _core.quantize_rows(12, np.zeros((2, 128), np.float32))
    with pytest.raises(ValueError, match="n_threads"):
        _core.quantize_rows(12, rows, None, 0)
    with pytest.raises(ValueError, match="type 99"):
        _core.quantize_rows(99, rows)
