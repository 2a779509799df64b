"""Dequantisation, quantize_q8 and matrix products of every type and tier, on adversarial inputs."""

import numpy as np
import numpy.typing as npt
import pytest
from blocks import QUANTISED, TYPES, extreme_rows, random_rows, set_quants, set_scales, spiky
from closeness import may_round_differently, nmse
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf
from phi_c import _core

TIERS = _core.tiers()
FAST_TIERS = TIERS[1:] or TIERS
FLOATS = ["F32", "F16", "BF16"]
# Pairs of tier and type whose prefill products read tiled activations: int8 with a scale per 256 (amx), bf16 (amxbf16).
TILED = [
    (tier, name)
    for tier, providers in _core.kernel_table().items()
    for name, provider in providers.items()
    if _core.max_exact_batch(tier) is not None and provider == tier
]
Floats = npt.NDArray[np.float32]


def reference_values(name: str, rows: npt.NDArray[np.uint8]) -> Floats:
    """Return the weights as the gguf package dequantises them."""
    return gguf.quants.dequantize(rows, GGMLQuantizationType[name])


def matrix(name: str, rows: npt.NDArray[np.uint8]) -> _core.Matrix:
    kind = TYPES[name]
    n_cols = rows.shape[1] // kind.block_bytes * kind.block_elements
    return _core.Matrix(kind.type_id, rows.shape[0], n_cols, rows.reshape(-1))


def takes_tiled(name: str, rows: npt.NDArray[np.uint8], n_tokens: int, tier: str) -> bool:
    """Return whether a product reads tiled activations: above max_exact_batch, whole panels and whole blocks of 256."""
    n_cols = rows.shape[1] // TYPES[name].block_bytes * TYPES[name].block_elements
    return (tier, name) in TILED and may_round_differently(tier, n_tokens) and len(rows) % 16 == 0 and n_cols % 256 == 0


def tiled_activations(x: Floats) -> npt.NDArray[np.float64]:
    """Return the values of activations in the amx tier's tiles: scale * (high + low / 254), one scale per 256."""
    blocks = x.reshape(-1, 256)
    scales = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales >= np.finfo(np.float32).tiny, np.float32(1) / scales, np.float32(0))
    scaled = np.clip(blocks * inverse, -127, 127)
    high = np.rint(scaled)
    low = np.rint((scaled - high) * np.float32(254))
    return (scales.astype(np.float64) * (high + low / 254.0)).reshape(x.shape)


def as_bf16(x: Floats) -> npt.NDArray[np.float64]:
    """Return floats rounded to bf16, ties to even; subnormal floats become 0."""
    bits = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)


def check_tiled_product(name: str, rows: npt.NDArray[np.uint8], x: Floats, tier: str) -> None:
    """Compare with float64 on activations rounded in the same way.

    amxbf16: weights are rounded to bf16 too, so that the remaining error is that of float32 summation.
    amx: weights are rounded to int8. Their error is at most half a step, plus the rounding of the factors that rescale
    the quants. A step is 1/127 of the largest magnitude that the smallest and the largest quant can have with the
    scales of the block's 256 columns.
    """
    got = _core.matmul(matrix(name, rows).packed(tier), x, tier)
    assert np.isfinite(got).all()
    if tier == "amxbf16":
        x64, weights = as_bf16(x), as_bf16(reference_values(name, rows))
        assert (np.abs(got - x64 @ weights.T) <= 2e-6 * (np.abs(x64) @ np.abs(weights).T) + 1e-12).all()
        return
    kind = TYPES[name]
    half_quants = {"Q4_0": 8, "Q4_1": 8, "Q8_0": 128, "Q4_K": 8, "Q5_K": 16, "Q6_K": 32}[name]
    ends = [np.abs(reference_values(name, set_quants(rows, kind, largest=end))) for end in (False, True)]
    steps = np.maximum(*ends).astype(np.float64).reshape(len(rows), -1, 256).max(2) / 127
    x64, weights = tiled_activations(x), reference_values(name, rows).astype(np.float64)
    by_block = np.abs(x64).reshape(len(x), -1, 256).sum(2)
    limit = by_block @ steps.T * (0.5 + (half_quants + 1) / 512) * 1.001 + 2e-6 * (np.abs(x64) @ np.abs(weights).T)
    assert (np.abs(got - x64 @ weights.T) <= limit + 1e-12).all()


def check_product(name: str, rows: npt.NDArray[np.uint8], x: Floats, tier: str, layout: str = "packed") -> None:
    """Compare with float64 on the tier's int8 activations: the remaining error is that of float32 summation."""
    if layout == "packed" and takes_tiled(name, rows, len(x), tier):
        check_tiled_product(name, rows, x, tier)
        return
    weights = reference_values(name, rows).astype(np.float64)
    if TYPES[name].quantised_activations:
        q8, scales, *_ = _core.quantize_q8(x.reshape(-1), tier)
        x64 = (q8.reshape(-1, 32) * scales.astype(np.float64)[:, None]).reshape(x.shape)
    else:
        x64 = x.astype(np.float64)
    exact = x64 @ weights.T
    # The limit is relative to the sum of magnitudes, since terms can cancel.
    magnitude = np.abs(x64) @ np.abs(weights).T
    weights_as_stored = matrix(name, rows)
    got = _core.matmul(weights_as_stored.packed(tier) if layout == "packed" else weights_as_stored, x, tier)
    assert np.isfinite(got).all()
    # Minima and offsets are subtracted as products of their own, so their magnitude is included.
    if TYPES[name].quantised_activations:
        magnitude = magnitude + np.abs(x64).sum(1, keepdims=True) * np.abs(weights).max(1)
    assert (np.abs(got - exact) <= 2e-6 * magnitude + 1e-12).all()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", TYPES)
def test_dequantize_is_bit_exact(name: str, tier: str) -> None:
    rng = np.random.default_rng(1)
    rows = random_rows(name, 16, 1024, rng)
    got = _core.dequantize(TYPES[name].type_id, rows.reshape(-1), 16 * 1024, tier)
    assert np.array_equal(got.view(np.uint32), reference_values(name, rows).reshape(-1).view(np.uint32))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", QUANTISED)
def test_dequantize_extreme_blocks(name: str, tier: str) -> None:
    rows = extreme_rows(name, 512)
    got = _core.dequantize(TYPES[name].type_id, rows.reshape(-1), rows.shape[0] * 512, tier)
    assert np.array_equal(got, reference_values(name, rows).reshape(-1))


@pytest.mark.parametrize("name", QUANTISED)
def test_dequantize_all_half_precision_scales(name: str) -> None:
    """Subnormal, infinite and NaN scales included."""
    rng = np.random.default_rng(2)
    kind = TYPES[name]
    scales = np.arange(65536, dtype=np.uint16).view(np.float16)[None, :]
    rows = rng.integers(0, 256, (1, 65536 * kind.block_bytes), dtype=np.uint8)
    set_scales(rows, kind, scales)
    n = 65536 * kind.block_elements
    got = _core.dequantize(kind.type_id, rows.reshape(-1), n)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(got, reference_values(name, rows).reshape(-1), equal_nan=True)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 5, 7, 8, 16, 23, 33])
@pytest.mark.parametrize("n_rows", [1, 2, 15, 16, 17, 33, 48])
@pytest.mark.parametrize("name", TYPES)
def test_matmul(name: str, n_rows: int, n_tokens: int, tier: str) -> None:
    rng = np.random.default_rng([n_rows, n_tokens])
    n_cols = 768
    check_product(name, random_rows(name, n_rows, n_cols, rng), spiky(n_tokens, n_cols, rng), tier)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("n_tokens", [1, 5, 33])
@pytest.mark.parametrize("name", TYPES)
def test_matmul_of_unpacked_weights(name: str, n_tokens: int, tier: str) -> None:
    """Matrices that could be packed, in the layout of the file."""
    rng = np.random.default_rng(n_tokens)
    check_product(name, random_rows(name, 48, 768, rng), spiky(n_tokens, 768, rng), tier, "mmap")


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("n_rows", [16, 19, 48])  # 48: a pair of panels and a single one
@pytest.mark.parametrize("name", TYPES)
def test_matmul_of_a_batch_equals_single_tokens(name: str, n_rows: int, tier: str) -> None:
    rng = np.random.default_rng(3)
    weights = matrix(name, random_rows(name, n_rows, 1280, rng)).packed(tier)
    x = spiky(33, 1280, rng)
    alone = np.concatenate([_core.matmul(weights, x[i : i + 1], tier) for i in range(len(x))])
    for n in (2, 3, 4, 5, 7, 8, 16, 23, 33):
        got = _core.matmul(weights, x[:n], tier)
        if may_round_differently(tier, n):
            assert nmse(got, alone[:n]) <= 1e-3
        else:
            assert np.array_equal(got, alone[:n])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", QUANTISED)
def test_matmul_extreme_blocks(name: str, tier: str) -> None:
    """The largest quants times activations of +-127: sums of pairs must not saturate."""
    rows = np.tile(extreme_rows(name, 512), (2, 1))  # a panel
    ones = np.ones((4, 512), np.float32)
    ones[1] *= -1
    ones[2, ::2] *= -1
    ones[3] *= np.float32(1e-30)
    check_product(name, rows, ones, tier)
    check_product(name, rows, np.tile(ones, (2, 1)), tier)
    check_product(name, rows, ones, tier, "mmap")


@pytest.mark.parametrize(("tier", "name"), TILED)
@pytest.mark.parametrize("shape", [(16, 17, 256), (48, 32, 1024), (80, 50, 512), (112, 97, 768)])
def test_tiled_products(shape: tuple[int, int, int], name: str, tier: str) -> None:
    """Panels in groups of four, two and one; tokens that fill their tiles, and a tile with one token."""
    n_rows, n_tokens, n_cols = shape
    rng = np.random.default_rng(shape)
    rows = random_rows(name, n_rows, n_cols, rng)
    assert takes_tiled(name, rows, n_tokens, tier)
    check_tiled_product(name, rows, spiky(n_tokens, n_cols, rng), tier)


@pytest.mark.parametrize(("tier", "name"), TILED)
def test_shapes_around_tiled_products(name: str, tier: str) -> None:
    """Rows that are not whole panels, or columns not whole blocks of 256, use the products of the tier below."""
    rng = np.random.default_rng(12)
    columns = (96, 256, 288) if TYPES[name].block_elements == 32 else (256,)
    for n_tokens in (16, 17, 31, 33, 64):
        for n_cols in columns:
            for n_rows in range(1, 34):
                check_product(name, random_rows(name, n_rows, n_cols, rng), spiky(n_tokens, n_cols, rng), tier)


@pytest.mark.parametrize(("tier", "name"), TILED)
def test_every_weight_of_a_tiled_product(name: str, tier: str) -> None:
    """Activations are the identity matrix, so that every weight is checked alone, and its position."""
    check_tiled_product(
        name, random_rows(name, 48, 256, np.random.default_rng(11)), np.eye(256, dtype=np.float32), tier
    )


@pytest.mark.parametrize(("tier", "name"), TILED)
def test_tiled_products_do_not_depend_on_other_rows_and_tokens(name: str, tier: str) -> None:
    rng = np.random.default_rng(6)
    rows, x = random_rows(name, 112, 512, rng), spiky(70, 512, rng)
    whole = _core.matmul(matrix(name, rows).packed(tier), x, tier)
    for n_tokens in (17, 32, 33, 64):
        assert np.array_equal(_core.matmul(matrix(name, rows).packed(tier), x[:n_tokens], tier), whole[:n_tokens])
    for n_rows in (16, 32, 64, 80):
        part = _core.matmul(matrix(name, rows[-n_rows:]).packed(tier), x, tier)
        assert np.array_equal(part, whole[:, -n_rows:])


@pytest.mark.parametrize(("tier", "name"), TILED)
@pytest.mark.parametrize("outliers", [False, True])
def test_tiled_products_against_float(outliers: bool, name: str, tier: str) -> None:
    """Compare with float weights and activations; `plain` has int8 activations with one scale per 256.

    amx: activations in two int8 parts leave the error of the weights. The NMSE is at most 2 times that of `plain`, or
    0.2 times with outlier channels. amxbf16: the NMSE was 5.1e-6 to 6.5e-6, with and without outliers.
    """
    rng = np.random.default_rng(7)
    rows = random_rows(name, 64, 1024, rng)
    x = spiky(64, 1024, rng) if outliers else rng.normal(size=(64, 1024)).astype(np.float32)
    weights = reference_values(name, rows).astype(np.float64)
    exact = x @ weights.T
    scales = np.abs(x.reshape(-1, 256)).max(1, keepdims=True) / 127
    plain = (np.rint(x.reshape(-1, 256) / scales) * scales).reshape(x.shape) @ weights.T
    got = _core.matmul(matrix(name, rows).packed(tier), x, tier)
    error, plain_error = nmse(got, exact), nmse(plain, exact)
    print(f"{tier} {name}: NMSE {error:.2e}, int8 activations {plain_error:.2e}")
    assert error <= (8e-6 if tier == "amxbf16" else (0.2 if outliers else 2.0) * plain_error)


@pytest.mark.parametrize(("tier", "name"), TILED)
def test_tiled_products_of_extreme_blocks(name: str, tier: str) -> None:
    """Extreme quants; large, zero and subnormal scales of both signs, mixed within a block of 256."""
    rng = np.random.default_rng(8)
    x = np.ones((32, 1024), np.float32)
    x[1::4] *= -1
    x[2::4, ::2] *= -1
    x[3::4] *= np.float32(1e-30)
    rows = np.concatenate([extreme_rows(name, 1024), random_rows(name, 8, 1024, rng)])
    n_blocks = 1024 // TYPES[name].block_elements
    check_tiled_product(name, rows, x, tier)
    for scales in ([0.0], [6e-8], [-6e-5, 6e-8], [-1.0, 0.0, 6e-8, 100.0, -100.0], [60000.0, -60000.0]):
        halves = rng.choice(np.array(scales, np.float16), (16, n_blocks))
        check_tiled_product(name, set_scales(rows.copy(), TYPES[name], halves), x, tier)


@pytest.mark.parametrize(("tier", "name"), TILED)
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
def test_tiled_products_of_non_finite_scales(scale: float, name: str, tier: str) -> None:
    """The row's products are not finite; those of the other rows of its panel do not change."""
    rng = np.random.default_rng(9)
    kind = TYPES[name]
    rows, x = random_rows(name, 32, 512, rng), spiky(20, 512, rng)
    expected = _core.matmul(matrix(name, rows).packed(tier), x, tier)
    set_scales(rows[5:6], kind, np.full((1, 512 // kind.block_elements), scale, np.float16))
    got = _core.matmul(matrix(name, rows).packed(tier), x, tier)
    assert not np.isfinite(got[:, 5]).any()
    others = np.arange(32) != 5
    assert np.array_equal(got[:, others], expected[:, others])


@pytest.mark.parametrize(("tier", "name"), TILED)
def test_tiled_products_of_non_finite_activations(name: str, tier: str) -> None:
    rng = np.random.default_rng(10)
    weights, x = matrix(name, random_rows(name, 32, 512, rng)).packed(tier), spiky(20, 512, rng)
    expected = _core.matmul(weights, x, tier)
    x[3, 300] = np.inf
    got = _core.matmul(weights, x, tier)
    others = np.arange(20) != 3
    assert not np.isfinite(got[3]).any() and np.array_equal(got[others], expected[others])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F32", "F16", "BF16"])
def test_matmul_of_short_rows(name: str, tier: str) -> None:
    rng = np.random.default_rng(4)
    for n_cols in (32, 96, 160) if TYPES[name].block_elements == 32 else (1, 7, 8, 15, 17, 100):
        for n_rows in (3, 16):
            check_product(name, random_rows(name, n_rows, n_cols, rng), spiky(5, n_cols, rng), tier)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("n_cols", [1, 15, 33, 1023, 1024, 1025, 2099])
@pytest.mark.parametrize("name", FLOATS)
def test_unaligned_float_rows(name: str, n_cols: int, tier: str) -> None:
    """Rows of any length and number, aligned to one element and surrounded by NaN; a batch equals single tokens."""
    rng = np.random.default_rng(n_cols)
    kind = TYPES[name]
    x = spiky(20, n_cols, rng)
    for n_rows in (1, 2, 3, 4, 5, 7):
        rows = random_rows(name, n_rows, n_cols, rng)
        memory = np.full(rows.size + 256, 0xFF, np.uint8)
        first = 64 + kind.block_bytes - memory.ctypes.data % 64
        memory[first : first + rows.size] = rows.reshape(-1)
        weights = _core.Matrix(kind.type_id, n_rows, n_cols, memory[first : first + rows.size])
        got = _core.matmul(weights, x, tier)
        values = reference_values(name, rows).astype(np.float64)
        assert (np.abs(got - x @ values.T) <= 2e-6 * (np.abs(x) @ np.abs(values).T) + 1e-12).all()
        for n_tokens in (1, 2, 3, 4, 5, 6, 7, 13):
            assert np.array_equal(_core.matmul(weights, x[:n_tokens], tier), got[:n_tokens])


@pytest.mark.parametrize("tier", FAST_TIERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_matmul_of_arbitrary_blocks(tier: str, data: st.DataObject) -> None:
    """Blocks of arbitrary bytes with finite scales, since infinities would hide other errors."""
    name = data.draw(st.sampled_from(QUANTISED))
    kind = TYPES[name]
    n_blocks = 512 // kind.block_elements
    size = n_blocks * kind.block_bytes
    rows = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(1, -1).copy()
    set_scales(rows, kind, np.float16(data.draw(st.floats(-1, 1, width=16))))
    seed = data.draw(st.integers(0, 2**32 - 1))
    x = spiky(3, 512, np.random.default_rng(seed))
    check_product(name, rows, x, tier)
    check_product(name, np.repeat(rows, 16, 0), x, tier)


@pytest.mark.parametrize("tier", TIERS)
def test_quantize_q8(tier: str) -> None:
    rng = np.random.default_rng(5)
    x = spiky(8, 256, rng)
    x[0] = 0
    x[1] = 1e-42  # subnormal: flushed to zero rather than divided by
    x[2] = 1e37  # its sums are still finite
    x[3, ::32] = 1.0
    x[3, 1::32] = 0.5 / 127  # a tie, rounded to even
    found = _core.quantize_q8(x.reshape(-1), tier)
    q8, scales = found.quants, found.scales
    blocks = x.reshape(-1, 32)
    assert np.array_equal(scales, np.abs(blocks).max(1) / np.float32(127))
    assert np.abs(q8.astype(int)).max() == 127
    error = np.abs(q8.reshape(-1, 32) * scales[:, None].astype(np.float64) - blocks)
    assert (error <= 0.5001 * scales[:, None] + 1e-40).all()
    sums, block_sums = q8.reshape(-1, 2, 16).sum(2), q8.reshape(-1, 32).sum(1)
    assert np.array_equal(found.sums, (sums * scales[:, None]).astype(np.float32).reshape(-1))
    assert np.array_equal(found.block_sums, (block_sums * scales).astype(np.float32))
    assert np.array_equal(found.offsets, -128 * sums.reshape(-1))
    assert np.array_equal(found.block_offsets, -128 * block_sums)
    for got, scalar in zip(found, _core.quantize_q8(x.reshape(-1), "scalar"), strict=True):
        assert np.array_equal(got, scalar)
    x[4, :3] = np.inf, -np.inf, np.nan
    expected = _core.quantize_q8(x.reshape(-1), "scalar")
    for got, scalar in zip(_core.quantize_q8(x.reshape(-1), tier), expected, strict=True):
        assert np.array_equal(got, scalar, equal_nan=True)


def test_unavailable_tier_raises() -> None:
    with pytest.raises(ValueError, match="'avx9' is not available on this machine, expected one of scalar"):
        _core.quantize_q8(np.ones(32, np.float32), "avx9")


def test_kernel_table_is_complete() -> None:
    table = _core.kernel_table()
    assert list(table) == TIERS
    for tier, row in table.items():
        assert set(row) == set(TYPES)
        assert all(TIERS.index(provider) <= TIERS.index(tier) for provider in row.values())


def test_kernels_are_inherited_from_available_tiers_only() -> None:
    """The avx512 tier is above avxvnni, and many CPUs have AVX-512 without AVX-VNNI."""
    providers = {provider for row in _core.kernel_table().values() for provider in row.values()}
    assert providers <= set(_core.tiers())
