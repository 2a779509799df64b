"""What the loops of kernel benchmarks call: results equal those of the kernels, and each call reads what it should."""

import numpy as np
import pytest

from phi_c import _core
from phi_c.bench import kernels
from phi_c.bench.kernels import CACHE, MEMORY, Kernel, Limit, Selection, make_cases

TIERS = _core.tiers()
N_COLS, N_ROWS = 512, 96  # two tasks of rows, the second smaller


@pytest.fixture(scope="module")
def arena() -> _core.Arena:
    return _core.Arena(1 << 20)


def activations(n_tokens: int, n_cols: int = N_COLS) -> np.typing.NDArray[np.float32]:
    return np.random.default_rng(n_tokens).normal(size=(n_tokens, n_cols)).astype(np.float32)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", _core.TENSOR_TYPES.values(), ids=lambda kind: kind.name)
def test_products_are_those_of_matmul(arena: _core.Arena, kind: _core.TensorType, tier: str) -> None:
    for n_tokens in (1, 5, 24):
        x = activations(n_tokens)
        loop = _core.ProductLoop(arena, kind.type_id, N_ROWS, x, tier)
        loop.out[:] = np.nan
        assert loop.seconds(3) > 0
        expected = _core.matmul(arena.matrix(kind.type_id, N_ROWS, N_COLS, tier), x, tier)
        assert np.isfinite(expected).all() and len(np.unique(expected)) > expected.size // 2
        np.testing.assert_array_equal(loop.out, expected)
        assert loop.n_bytes == N_ROWS * N_COLS // kind.block_elements * kind.block_bytes


def test_packed_types_are_multiplied_packed(arena: _core.Arena) -> None:
    """The same bytes as rows and as panels are other weights, so the products differ."""
    tier = TIERS[-1]
    data = np.random.default_rng(0).integers(0x10, 0x3C, N_ROWS * N_COLS // 256 * 144, dtype=np.uint8)
    rows = _core.Matrix(12, N_ROWS, N_COLS, data)
    is_packed = rows.packed_bytes(tier) > 0
    loop = _core.ProductLoop(arena, 12, N_ROWS, activations(1), tier)
    loop.seconds(1)
    assert (not np.array_equal(loop.out, _core.matmul(rows, activations(1), tier))) == is_packed


def test_calls_in_memory_read_all_matrices_in_turn() -> None:
    """Each call reads the weights after those of the last one, and starts again where no whole matrix is left."""
    type_id, n_rows, n_cols = 0, 16, 64  # float32
    n_bytes = n_rows * n_cols * 4
    arena = _core.Arena(8 * n_bytes + 64)  # eight matrices, and a rest that is too small for one
    weights = _core.dequantize(0, np.random.default_rng(0).integers(0x10, 0x3C, 1 << 20, dtype=np.uint8), 1 << 18)
    x = activations(1, n_cols)
    loop = _core.ProductLoop(arena, type_id, n_rows, x, "scalar", walks=True)
    for i in (*range(8), 0, 1):
        loop.seconds(1)
        matrix = weights[i * n_rows * n_cols :][: n_rows * n_cols].reshape(n_rows, n_cols)
        np.testing.assert_allclose(loop.out[0], matrix @ x[0], rtol=1e-4, atol=1e-6)
    other = _core.ReadLoop(arena, n_bytes)
    other.seconds(3)  # reads matrices 2 to 4: all loops of an arena share its position
    loop.seconds(1)
    matrix = weights[5 * n_rows * n_cols :][: n_rows * n_cols].reshape(n_rows, n_cols)
    np.testing.assert_allclose(loop.out[0], matrix @ x[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kv_type", ["f16", "q8"])
def test_attention_is_that_of_the_kernel(arena: _core.Arena, tier: str, kv_type: str) -> None:
    """Tiers agree, and a call that walks reads other pages than the call before it."""
    outs = {}
    for name in ("scalar", tier):
        loop = _core.AttentionLoop(arena, 3, 70, 2, 64, name, kv_type=kv_type)
        loop.seconds(2)
        outs[name] = loop.out.copy()
        assert np.isfinite(loop.out).all()
    np.testing.assert_allclose(outs[tier], outs["scalar"], rtol=2e-3, atol=1e-3)
    walking = _core.AttentionLoop(arena, 3, 70, 2, 64, tier, kv_type=kv_type, walks=True)
    walking.seconds(1)
    first = walking.out.copy()
    walking.seconds(1)
    assert not np.array_equal(walking.out, first)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("op", "variant"), _core.VECTOR_OPS)
def test_vector_operations_are_those_of_the_kernels(op: str, variant: str, tier: str) -> None:
    n = 96
    loop = _core.VectorLoop(op, variant, n, tier)
    x, weight, bias = loop.inputs
    expected = {
        "rms_norm": lambda: _core.rms_norm(x, weight, 1e-5, tier),
        "layer_norm": lambda: _core.layer_norm(x, weight, bias, 1e-5, tier),
        "silu_mul": lambda: _core.silu_mul(x, weight, tier),
        "gelu": lambda: _core.gelu(x, tier),
        "add": lambda: _core.add(x, x, tier),
        "rope": lambda: _core.rope(x, weight[: n // 2], bias[: n // 2], variant, tier),
        "quantize_q8": lambda: _core.quantize_q8(x, tier),
        "store_kv": lambda: _core.store_kv(x, weight, 0, tier, variant),
    }[op]()
    before = [np.array(part) for part in loop.out]
    assert loop.seconds(1) >= 0
    if op == "quantize_q8":
        for found, part in zip(loop.out, expected, strict=True):
            np.testing.assert_array_equal(found, part)
        loop.out.quants[:] = 0
        loop.seconds(1)
        np.testing.assert_array_equal(loop.out.quants, expected.quants)
    elif op == "store_kv":
        np.testing.assert_array_equal(loop.out, expected)
        loop.seconds(2)
        assert not np.array_equal(loop.out, expected)  # the second call writes the next position
    else:
        np.testing.assert_array_equal(loop.out[0], expected)
        assert not np.array_equal(before[0], expected)
        assert all(np.array_equal(row, x) for row in loop.out[1:])  # rope: the heads of later calls


@pytest.mark.parametrize("tier", TIERS[1:])
@pytest.mark.parametrize("quantised", [False, True])
def test_loops_of_multiplications_count_what_they_compute(tier: str, quantised: bool) -> None:
    """All factors are 1, so the sum of the products is their number; vpmaddubsw and SMULL do not accumulate."""
    loop = _core.MultiplyLoop(tier, quantised=quantised)
    n_steps = 1000
    if not (quantised and tier in ("avx2", "neon")):
        assert loop.total(n_steps) == n_steps * loop.macs
    assert loop.seconds(100_000) > 0


def test_scalar_has_no_loop_of_multiplications() -> None:
    with pytest.raises(ValueError, match="'scalar' has no loop of multiplications"):
        _core.MultiplyLoop("scalar")


def test_barriers_start_their_threads() -> None:
    assert _core.BarrierLoop(3).seconds(10) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: _core.ProductLoop(a, 0, 1 << 20, activations(1)), "expected at most 1048576"),
        (lambda a: _core.AttentionLoop(a, 1, 100_000, 1, 96), "expected at most 1048576 bytes"),
        (lambda a: _core.AttentionLoop(a, 2, 1, 1, 96), "no attention of 2 tokens, 1 positions"),
        (lambda a: _core.ReadLoop(a, 100), "n_bytes is 100, expected a multiple of 64"),
        (lambda a: _core.Arena(100), "n_bytes is 100, expected a positive multiple of 64"),
        (lambda a: _core.VectorLoop("quantize_q8", "", 48), "quantize_q8 of 48 elements, expected a multiple of 32"),
    ],
)
def test_invalid_sizes(arena: _core.Arena, call: "kernels.Callable[[_core.Arena], object]", message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(arena)


# ---- the selection ----


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ARENA_BYTES", 8 << 20)


def names(selection: Selection) -> list[Kernel]:
    return [case.name for case in make_cases(selection) if isinstance(case.name, Kernel)]


@pytest.mark.usefixtures("small")
def test_default_selection() -> None:
    """All types on the tiers that implement them, in cache and, for small batches, in memory."""
    found = names(Selection(n_tokens=(1, 24), n_cols=256))
    table = _core.kernel_table()
    tiers = TIERS[1:] or TIERS
    expected = {
        (kind.name, tier, n, data)
        for kind in _core.TENSOR_TYPES.values()
        for tier in tiers
        if table[tier][kind.name] == tier
        for n, data in ((1, CACHE), (1, MEMORY), (24, CACHE))
    }
    assert {(k.type, k.tier, k.n_tokens, k.data) for k in found} == expected and len(found) == len(expected)


@pytest.mark.usefixtures("small")
def test_chosen_tiers_include_inherited_products() -> None:
    chosen = Selection(types=("Q2_K",), tiers=tuple(TIERS), n_tokens=(1,), n_rows=20, n_cols=512, data=MEMORY)
    assert names(chosen) == [Kernel("matmul", "Q2_K", tier, 1, "20x512", MEMORY) for tier in TIERS]


@pytest.mark.usefixtures("small")
def test_sizes_and_limits_of_cases() -> None:
    cases = make_cases(Selection(types=("F16", "Q4_K"), tiers=(TIERS[-1],), n_tokens=(3,), n_rows=32, n_cols=256))
    limits = {case.name for case in cases if isinstance(case.name, Limit)}
    by_name = {(case.name.type, case.name.data): case for case in cases if isinstance(case.name, Kernel)}
    assert by_name["Q4_K", CACHE].n_bytes == 32 * 144 and by_name["F16", CACHE].n_bytes == 32 * 512
    assert by_name["Q4_K", MEMORY].n_macs == 32 * 256 * 3
    assert by_name["Q4_K", MEMORY].limit == Limit("read")
    assert {limit.name for limit in limits} == ({"read", "multiply"} if len(TIERS) > 1 else {"read"})
    if len(TIERS) > 1:
        assert by_name["Q4_K", CACHE].limit == Limit("multiply", "q8", TIERS[-1])
        assert by_name["F16", CACHE].limit == Limit("multiply", "f32", TIERS[-1])


@pytest.mark.usefixtures("small")
def test_every_operation_has_cases() -> None:
    found = names(Selection(ops=kernels.OPS, types=("Q8_0",), tiers=(TIERS[-1],), n_tokens=(1,)))
    assert tuple(dict.fromkeys(kernel.op for kernel in found)) == kernels.OPS
    assert len(set(found)) == len(found)
    n_visible = {case.name.size: case.n_macs for case in make_cases(Selection(ops=("attention",), tiers=("scalar",)))
                 if isinstance(case.name, Kernel) and case.name.n_tokens == 64}  # fmt: skip
    assert n_visible["128x96"] == 2 * 96 * sum(range(65, 129))
