"""Element-wise kernels of every tier against float64: norms, SiLU, GELU, addition."""

import numpy as np
import pytest
from blocks import spiky

from phi_c import _core

TIERS = _core.tiers()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("n", [2, 7, 8, 15, 17, 64, 100, 3072])
def test_rms_norm(n: int, tier: str) -> None:
    rng = np.random.default_rng(n)
    x, weight = spiky(1, n, rng)[0], rng.normal(size=n).astype(np.float32)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean() + 1e-5) * weight
    np.testing.assert_allclose(_core.rms_norm(x, weight, 1e-5, tier), exact, rtol=1e-6)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("n", [1, 8, 13, 1000])
def test_silu_mul(n: int, tier: str) -> None:
    rng = np.random.default_rng(n)
    gate = (rng.normal(size=n) * 20).astype(np.float32)
    gate[0] = -85
    up = rng.normal(size=n).astype(np.float32)
    exact = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(_core.silu_mul(gate, up, tier), exact, rtol=2e-6)


@pytest.mark.parametrize("tier", TIERS)
def test_silu_mul_of_extreme_values(tier: str) -> None:
    gate = np.array([0, -0.0, 1e-42, 200, -200, 3e38, np.inf, np.nan, *range(12)], np.float32)
    got = _core.silu_mul(gate, np.ones(len(gate), np.float32), tier)
    assert np.array_equal(got[[0, 3, 5, 6]], np.array([0, 200, 3e38, np.inf], np.float32))
    assert abs(got[4]) <= 1e-30 and abs(got[2]) <= 1e-42
    assert np.array_equal(np.isnan(got), np.isnan(gate))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 33, 100])
def test_add(n: int, tier: str) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n)).astype(np.float32)
    x[0], x[n // 2], y[-1] = 1e-42, np.inf, np.nan
    assert np.array_equal(_core.add(x, y, tier), x + y, equal_nan=True)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("n", [2, 7, 8, 15, 17, 64, 100, 2560])
def test_layer_norm(n: int, tier: str) -> None:
    rng = np.random.default_rng(n)
    x, weight, bias = spiky(1, n, rng)[0] + np.float32(3), *rng.normal(size=(2, n)).astype(np.float32)
    centred = x - x.astype(np.float64).mean()
    exact = centred / np.sqrt((centred**2).mean() + 1e-5) * weight + bias
    np.testing.assert_allclose(_core.layer_norm(x, weight, bias, 1e-5, tier), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tier", TIERS)
def test_layer_norm_with_a_large_mean(tier: str) -> None:
    """A large mean does not reduce the precision of the result."""
    x = (1000 + np.random.default_rng(0).normal(size=256) / 64).astype(np.float32)
    centred = x - x.astype(np.float64).mean()
    ones = np.ones(256, np.float32)
    got = _core.layer_norm(x, ones, ones * 0, 1e-12, tier)
    np.testing.assert_allclose(got, centred / np.sqrt((centred**2).mean() + 1e-12), atol=5e-3)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("n", [1, 8, 13, 1000])
def test_gelu(n: int, tier: str) -> None:
    x = (np.random.default_rng(n).normal(size=n) * 3).astype(np.float32)
    exact = x.astype(np.float64)
    exact = exact / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)))
    np.testing.assert_allclose(_core.gelu(x, tier), exact, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("tier", TIERS)
def test_gelu_of_extreme_values(tier: str) -> None:
    x = np.array([0, -0.0, 1e-42, 200, -200, 3e38, -3e38, np.inf, np.nan, *range(12)], np.float32)
    got = _core.gelu(x, tier)
    assert np.array_equal(got[[0, 3, 5, 7]], np.array([0, 200, 3e38, np.inf], np.float32))
    assert np.abs(got[[1, 2, 4, 6]]).max() <= 1e-30
    assert np.array_equal(np.isnan(got), np.isnan(x))
