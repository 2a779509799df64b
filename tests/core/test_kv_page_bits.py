"""Content of KV pages, pages behind the sliding window, and positions at the end of a long context."""

from pathlib import Path

import numpy as np
import pytest
from forward_helper import Runner

from exhaustive import mostly_exhaustive
from phi_c import _core
from phi_c._core import KV_TYPES, PAGE_TOKENS, KvCache, forward
from phi_c.engine.kv_pages import first_needed
from reference import Reference
from tiny_gguf import write_tiny

TOKENS = [int(t) for t in np.random.default_rng(3).integers(3, 300, 330)]


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_pages_can_be_copied_to_another_cache(tmp_path: Path, kv_type: str) -> None:
    """A sequence continues in another cache, on other pages, with the same bits."""
    runner = Runner(write_tiny(tmp_path / "m.gguf", weight_type="Q8_0"), kv_type=kv_type)
    table = runner.table()
    expected = runner.run(TOKENS[:100], table=table)[96:]
    pages = [runner.kv.read_page(int(page)) for page in table[:3]]
    assert all(page.shape == (runner.kv.page_bytes,) and page.dtype == np.uint8 for page in pages)
    runner.kv = KvCache(runner.model, 8, kv_type)
    for page, data in zip((7, 0, 5), pages, strict=True):
        runner.kv.write_page(page, data)
    assert np.array_equal(runner.kv.read_page(0), pages[1])
    got = runner.run(TOKENS[96:100], 96, table=np.asarray([7, 0, 5, 2], np.int32))
    assert np.array_equal(got, expected)


def test_invalid_page_numbers_and_sizes_raise(tmp_path: Path) -> None:
    kv = Runner(write_tiny(tmp_path / "m.gguf"), n_pages=4).kv
    data = kv.read_page(3)
    assert not data.any()
    for page in (-1, 4, 2**31 - 1):
        with pytest.raises(IndexError, match="expected 0 to 3"):
            kv.read_page(page)
        with pytest.raises(IndexError, match="expected 0 to 3"):
            kv.write_page(page, data)
    for wrong in (data[:-1], np.append(data, data[:1]), data[:0]):
        with pytest.raises(ValueError, match=f"expected {kv.page_bytes}"):
            kv.write_page(0, wrong)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("tier", _core.tiers())
@pytest.mark.parametrize("window", mostly_exhaustive([1, 31, 32, 33, 64, 100], keep={33, 64}))
def test_pages_behind_the_window_are_not_read(tmp_path: Path, tier: str, kv_type: str, window: int) -> None:
    """Pages behind the window of every token may have any content; here they are NaN."""
    path = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", window=window)
    runner = Runner(path, tier=tier, n_pages=16, kv_type=kv_type)
    table = runner.table(end=15)
    runner.kv.write_page(15, np.full(runner.kv.page_bytes, 0xFF, np.uint8))
    runner.run(TOKENS, table=table)
    for n in (1, 2, 16, 40):
        for start in (*range(window - 1, window + 3), 128, 129, 200, 255, 256, 257, 280):
            expected = runner.run(TOKENS[start : start + n], start, table=table)
            behind = table.copy()
            behind[: first_needed(start, window)] = 15
            got = runner.run(TOKENS[start : start + n], start, table=behind)
            assert np.isfinite(expected).all()
            assert np.array_equal(got, expected)
    # Counter-check: NaN in the first page within the window changes the logits.
    within = table.copy()
    within[: first_needed(300, window) + 1] = 15
    expected = runner.run(TOKENS[300:301], 300, table=table)
    assert np.array_equal(runner.run(TOKENS[300:301], 300, table=within), expected) is (window == 1)


class OffsetReference(Reference):
    """The NumPy reference with its first token at position `start`."""

    start = 0

    def rotation(self, n_tokens: int, long_rope: bool) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = super().rotation(self.start + n_tokens, long_rope)
        return cos[self.start :], sin[self.start :]


@pytest.mark.parametrize("long_rope", [False, True])
def test_last_positions_of_a_long_context(tmp_path: Path, long_rope: bool) -> None:
    """The last of 131072 positions against the float32 reference.

    With two layers and a window of 60, a position depends on the 118 tokens before it only.
    """
    path = write_tiny(tmp_path / "m.gguf", weight_type="F32", n_ctx=131072, window=60, n_ctx_orig=4096)
    reference = OffsetReference(path)
    reference.start = 131072 - 320
    runner = Runner(path, n_pages=16)
    table = np.zeros(131072 // PAGE_TOKENS, np.int32)
    first = reference.start // PAGE_TOKENS
    table[first:] = runner.table()[: len(table) - first]
    got = runner.run(TOKENS[:320], reference.start, table=table, long_rope=long_rope)[118:]
    expected = reference.logits(TOKENS[:320], long_rope=long_rope)[118:]
    error = ((got - expected) ** 2).sum(1) / (expected**2).sum(1)
    assert error.max() < 1e-5
    other = reference.logits(TOKENS[:320], long_rope=not long_rope)
    assert ((got[-1] - other[-1]) ** 2).sum() > 1e-3 * (other[-1] ** 2).sum()


def test_attention_over_131072_positions(tmp_path: Path) -> None:
    """A token that attends to all of them, against float64."""
    rng = np.random.default_rng(0)
    head_dim, n = 64, 131072
    k, v = (rng.normal(size=(n, head_dim)).astype(np.float16).astype(np.float32) for _ in "kv")
    q = rng.normal(size=(1, 1, head_dim)).astype(np.float32)
    for tier in _core.tiers():
        got = _core.attention(q, k, v, n - 1, 0, head_dim**-0.5, tier)
        scores = k.astype(np.float64) @ q[0, 0].astype(np.float64) * head_dim**-0.5
        weights = np.exp(scores - scores.max())
        expected = weights / weights.sum() @ v
        assert np.abs(got[0, 0] - expected).max() < 1e-4 * np.abs(v).max()


def test_last_token_of_a_full_context_attends_to_all_pages(tmp_path: Path) -> None:
    """Without a window, position 131071 attends to every page: changing any page changes its logits."""
    path = write_tiny(tmp_path / "m.gguf", weight_type="F32", n_ctx=131072)
    runner = Runner(path, n_pages=40)
    page = runner.run(TOKENS[:32], table=np.asarray([0], np.int32))
    table = np.zeros(131072 // PAGE_TOKENS, np.int32)
    table[-1] = 1
    blank = runner.kv.read_page(1)

    def last_logits() -> np.ndarray:
        runner.kv.write_page(1, blank)
        return runner.run(TOKENS[:32], n_last, table=table)[-1]

    n_last = 131072 - 32
    expected = last_logits()
    assert np.isfinite(expected).all()
    assert np.array_equal(expected, last_logits())
    for index in (0, 1, 2047, 4094):
        # Keys and values of one page of 4095 are 50 times larger, so that it has a visible effect.
        larger = runner.kv.read_page(0).view(np.float16).copy() * np.float16(50)
        runner.kv.write_page(2, larger.view(np.uint8))
        table[index] = 2
        assert not np.array_equal(last_logits(), expected)
        table[index] = 0
    assert page.shape == (32, runner.config.n_vocab)


def test_memory_is_committed_as_pages_are_written(tmp_path: Path) -> None:
    """A cache of 131072 positions reserves 1 GiB of address space but uses memory for written pages only."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system has no /proc/self/status to read the resident memory from")

    def resident() -> int:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) * 1024

    path = write_tiny(tmp_path / "m.gguf", n_layers=4, n_heads=8, n_kv_heads=8, head_dim=64, n_ctx=131072)
    runner = Runner(path, n_pages=1)
    before = resident()
    kv = KvCache(runner.model, 131072 // PAGE_TOKENS)
    assert kv.page_bytes * kv.n_pages == 1 << 30
    assert resident() - before < 64 << 20
    table = np.arange(kv.n_pages, dtype=np.int32)
    n = 330
    forward(
        runner.model, kv, np.asarray(TOKENS, np.int32), np.arange(n, dtype=np.int32), np.zeros(n, np.int32), [table],
        [False], np.asarray([n - 1], np.int32),
    )  # fmt: skip
    assert resident() - before < 128 << 20
