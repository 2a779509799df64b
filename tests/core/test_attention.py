"""Rotary embeddings, KV cache pages and attention, on every tier."""

import numpy as np
import numpy.typing as npt
import pytest
from blocks import spiky

from phi_c import _core

TIERS = _core.tiers()
Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize(
    ("head_dim", "rope_dims"), [(2, 2), (20, 14), (64, 64), (80, 32), (80, 40), (96, 96), (128, 98)]
)
def test_rope_matches_the_scalar_tier_bit_for_bit(head_dim: int, rope_dims: int, style: str, tier: str) -> None:
    rng = np.random.default_rng([head_dim, rope_dims])
    x = rng.normal(size=head_dim).astype(np.float32)
    cos, sin = rng.normal(size=(2, rope_dims // 2)).astype(np.float32)
    got = _core.rope(x, cos, sin, style, tier)
    assert np.array_equal(got, _core.rope(x, cos, sin, style, "scalar"))
    pairs = x[:rope_dims].astype(np.float64).reshape((2, -1) if style == "neox" else (-1, 2))
    a, b = pairs if style == "neox" else pairs.T
    exact = np.stack([a * cos - b * sin, b * cos + a * sin], 0 if style == "neox" else 1).reshape(-1)
    np.testing.assert_allclose(got[:rope_dims], exact, rtol=1e-5, atol=1e-6)
    assert np.array_equal(got[rope_dims:], x[rope_dims:])
    x[0], x[rope_dims - 1] = np.nan, np.inf
    got, expected = _core.rope(x, cos, sin, style, tier), _core.rope(x, cos, sin, style, "scalar")
    assert np.array_equal(got, expected, equal_nan=True) and np.isnan(got[0])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("slot", [0, 5, 15, 16, 31])
@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 96, 128])
def test_store_kv(head_dim: int, slot: int, tier: str) -> None:
    """Values are rounded as NumPy does, special values included, and only the slot is written."""
    rng = np.random.default_rng([head_dim, slot])
    special = np.array(
        [0, -0.0, 1e-42, 6e-8, -2.9e-8, 3e-8, 6.1e-5, 65504, 65519.9, 65520, -1e30, np.inf, -np.inf, np.nan], np.float32
    )
    k, v = (
        rng.permutation(np.resize(np.concatenate([special, rng.normal(size=50)]), 2 * head_dim))
        .astype(np.float32)
        .reshape(2, head_dim)
    )
    page = _core.store_kv(k, v, slot, tier).view(np.float16)
    keys = page[: 32 * head_dim].reshape(2, head_dim, 16).transpose(0, 2, 1).reshape(32, head_dim)
    values = page[32 * head_dim :].reshape(32, head_dim)
    with np.errstate(over="ignore"):
        assert np.array_equal(keys[slot], k.astype(np.float16), equal_nan=True)
        assert np.array_equal(values[slot], v.astype(np.float16), equal_nan=True)
    others = np.arange(32) != slot
    assert (keys[others].view(np.uint16) == 0xFFFF).all() and (values[others].view(np.uint16) == 0xFFFF).all()
    assert np.array_equal(page.view(np.uint16), _core.store_kv(k, v, slot, "scalar").view(np.uint16))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 96, 128])
@pytest.mark.parametrize("window", [0, 1, 40])
@pytest.mark.parametrize(
    ("query_start", "n_tokens"), [(0, 1), (31, 1), (32, 3), (70, 8), (100, 5), (120, 13), (230, 32)]
)
def test_attention(query_start: int, n_tokens: int, window: int, head_dim: int, tier: str) -> None:
    """Against float64, with three query heads per key/value head. Masked positions hold NaN, as freed pages may."""
    rng = np.random.default_rng([query_start, n_tokens, head_dim])
    q = rng.normal(size=(n_tokens, 3, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, query_start + n_tokens, head_dim)).astype(np.float16).astype(np.float32)
    scale = head_dim**-0.5
    got = _core.attention(q, k, v, query_start, window, scale, tier)
    for t in range(n_tokens):
        first = max(0, query_start + t + 1 - window) if window else 0
        scores = q[t].astype(np.float64) @ k[first : query_start + t + 1].T * scale
        weights = np.exp(scores - scores.max(1, keepdims=True))
        exact = weights @ v[first : query_start + t + 1] / weights.sum(1, keepdims=True)
        np.testing.assert_allclose(got[t], exact, rtol=2e-5, atol=2e-6)
        alone = _core.attention(
            q[t : t + 1], k[: query_start + t + 1], v[: query_start + t + 1], query_start + t, window, scale, tier
        )
        assert np.array_equal(got[t], alone[0])


def in_int8(x: Floats) -> Floats:
    """Return floats as stored in int8 pages: one half-precision scale per 32 dimensions."""
    padded = np.zeros((len(x), -(-x.shape[1] // 32) * 32), np.float32)
    padded[:, : x.shape[1]] = x
    blocks = padded.reshape(len(x), -1, 32)
    scales = (np.abs(blocks).max(2, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    q = np.clip(np.rint(blocks * inverse), -127, 127)
    return (q * scales).reshape(padded.shape)[:, : x.shape[1]]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("slot", [0, 15, 16, 31])
@pytest.mark.parametrize("head_dim", [2, 20, 64, 72, 96, 128])
def test_store_kv_in_int8(head_dim: int, slot: int, tier: str) -> None:
    """Byte for byte as the scalar tier, also for zeros, blocks whose scale underflows, infinities and NaN."""
    rng = np.random.default_rng([head_dim, slot])
    for x in (spiky(2, head_dim, rng), np.zeros((2, head_dim), np.float32), np.full((2, head_dim), 1e-9, np.float32)):
        for special in (None, 1e-42, np.inf, np.nan, 1e9):
            if special is not None:
                x[0, 0] = x[1, -1] = special
            got = _core.store_kv(x[0], x[1], slot, tier, "q8")
            assert np.array_equal(got, _core.store_kv(x[0], x[1], slot, "scalar", "q8"))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 96, 128])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(("query_start", "n_tokens"), [(0, 1), (32, 3), (100, 5), (120, 13), (230, 32)])
def test_attention_in_int8(query_start: int, n_tokens: int, window: int, head_dim: int, tier: str) -> None:
    """Against float64 on the keys and values as stored, with outlier channels a hundred times larger."""
    rng = np.random.default_rng([query_start, n_tokens, head_dim])
    q = rng.normal(size=(n_tokens, 3, head_dim)).astype(np.float32)
    k, v = spiky(query_start + n_tokens, head_dim, rng), spiky(query_start + n_tokens, head_dim, rng)
    q[..., np.abs(k).max(0) > 20] /= 100  # so that outlier channels do not dominate the scores
    stored_k, stored_v = in_int8(k).astype(np.float64), in_int8(v).astype(np.float64)
    scale = head_dim**-0.5
    got = _core.attention(q, k, v, query_start, window, scale, tier, "q8")
    for t in range(n_tokens):
        end = query_start + t + 1
        first = max(0, end - window) if window else 0
        scores = q[t].astype(np.float64) @ stored_k[first:end].T * scale
        weights = np.exp(scores - scores.max(1, keepdims=True))
        exact = weights @ stored_v[first:end] / weights.sum(1, keepdims=True)
        np.testing.assert_allclose(got[t], exact, rtol=2e-5, atol=2e-6 * np.abs(stored_v).max())
        alone = _core.attention(q[t : t + 1], k[:end], v[:end], end - 1, window, scale, tier, "q8")
        assert np.array_equal(got[t], alone[0])


def test_unknown_kv_type_is_rejected() -> None:
    x = np.ones(32, np.float32)
    with pytest.raises(ValueError, match="kv_type is 'q4', expected one of f16, q8"):
        _core.store_kv(x, x, 0, None, "q4")
