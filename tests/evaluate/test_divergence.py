"""compare: a model with itself, two models against NumPy, models that cannot be compared."""

import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import phi_c
from phi_c.engine import prompt_outputs
from phi_c.errors import Cancelled, OptionError, PhiError
from phi_c.evaluate import compare
from phi_c.evaluate.metrics import token_metrics
from reference import Reference
from tiny_gguf import write_tiny

TEXT = "the and in of it is on at or then there hand thing " * 10
N_CTX = 50


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write_tiny(folder / "a.gguf", "phi3", "F32"), write_tiny(folder / "b.gguf", "llama", "F32", seed=1)


@pytest.fixture
def models(paths: tuple[Path, Path]) -> Iterator[tuple[phi_c.LLM, phi_c.LLM]]:
    with phi_c.load(paths[0]) as a, phi_c.load(paths[1], n_batch=33) as b:
        yield a, b


def test_model_with_itself(paths: tuple[Path, Path]) -> None:
    with phi_c.load(paths[0]) as a, phi_c.load(paths[0], n_batch=7, n_threads=1) as b:
        found = compare(a, b, TEXT, n_ctx=N_CTX)
        assert compare(a, a, TEXT, n_ctx=N_CTX) == found
    assert (found.kl, found.kl_median, found.kl_99, found.kl_max, found.kl_standard_error) == (0, 0, 0, 0, 0)
    assert (found.top1_agreement, found.perplexity_ratio, found.perplexity_ratio_standard_error) == (1, 1, 0)
    assert all((bucket.kl, bucket.top1_agreement) == (0, 1) for bucket in found.by_position)


def test_two_models_match_numpy(paths: tuple[Path, Path], models: tuple[phi_c.LLM, phi_c.LLM]) -> None:
    a, b = models
    ids = a.tokenizer.encode(TEXT)
    kl, top1_agreement, nll_a, nll_b = [], [], [], []
    for start in range(0, len(ids) // N_CTX * N_CTX, N_CTX):
        window = [a.tokenizer.bos_id, *ids[start + 1 : start + N_CTX]]
        p, q = (log_softmax(Reference(path).logits(window)) for path in paths)
        kl.append((np.exp(p) * (p - q)).sum(1))
        top1_agreement.append(p.argmax(1) == q.argmax(1))
        nll_a.append(-p[np.arange(N_CTX - 1), window[1:]])
        nll_b.append(-q[np.arange(N_CTX - 1), window[1:]])
    found = compare(a, b, TEXT, n_ctx=N_CTX)
    assert found.n_windows == len(kl) >= 3
    assert found.n_tokens == N_CTX * len(kl)
    assert found.kl > 0.1
    near = {"rel": 2e-3}
    assert found.kl == pytest.approx(np.mean(kl), **near)
    assert found.kl_median == pytest.approx(np.median(kl), **near)
    assert found.kl_99 == pytest.approx(np.quantile(kl, 0.99), **near)
    assert found.kl_max == pytest.approx(np.max(kl), **near)
    assert found.kl_standard_error == pytest.approx(np.std(np.mean(kl, 1), ddof=1) / len(kl) ** 0.5, rel=0.05)
    assert found.top1_agreement == pytest.approx(np.mean(top1_agreement), abs=0.02)
    assert found.perplexity_a == pytest.approx(math.exp(np.mean(nll_a)), **near)
    assert found.perplexity_b == pytest.approx(math.exp(np.mean(nll_b)), **near)
    assert found.perplexity_ratio == pytest.approx(found.perplexity_b / found.perplexity_a)
    assert [bucket.first for bucket in found.by_position] == [0, 7, 14, 20, 26, 32, 38, 44]
    assert found.by_position[-1].last == N_CTX - 1
    for bucket in found.by_position:
        part = np.asarray(kl)[:, bucket.first : bucket.last + 1]
        assert bucket.kl == pytest.approx(part.mean(), **near)
    assert compare(a, b, TEXT, n_ctx=N_CTX, n_windows=1).n_windows == 1


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def test_results_do_not_depend_on_chunks(models: tuple[phi_c.LLM, phi_c.LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compare(*models, TEXT, n_ctx=N_CTX)
    monkeypatch.setattr(prompt_outputs, "LM_HEAD_ROWS", 7)
    monkeypatch.setattr("phi_c.evaluate.metrics._MAX_CHUNK_VALUES", 1)
    found = compare(*models, TEXT, n_ctx=N_CTX)
    assert found.kl == pytest.approx(expected.kl, rel=1e-12)
    assert found.top1_agreement == expected.top1_agreement


def test_memory_is_bounded_by_one_chunk_of_logits(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "wide.gguf", "phi3", "Q8_0", n_extra_words=20000)
    with phi_c.load(path) as a, phi_c.load(path) as b:
        window_bytes = 500 * a.config.n_vocab * 4
        assert window_bytes > 40e6
        tracemalloc.start()
        try:
            assert compare(a, b, TEXT * 5, n_ctx=500, n_windows=1).n_tokens == 500
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 0.5 * window_bytes


def test_token_metrics() -> None:
    p, q = np.asarray([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]), np.asarray([[0.25, 0.5, 0.25], [0.2, 0.5, 0.3]])
    found = token_metrics(np.log(p).astype(np.float32) + 3, np.log(q).astype(np.float32), np.asarray([2]))
    np.testing.assert_allclose(found["kl"], (p * np.log(p / q)).sum(1), atol=1e-6)
    assert found["top1_agreement"].tolist() == [False, True]
    np.testing.assert_allclose(found["nll"], [-np.log(0.25)], atol=1e-6)
    np.testing.assert_allclose(found["reference_nll"], [-np.log(0.25)], atol=1e-6)


def test_invalid_models_and_options(models: tuple[phi_c.LLM, phi_c.LLM], tmp_path: Path) -> None:
    a, b = models
    with pytest.raises(OptionError, match="expected at least 50: 1 window of 50"):
        compare(a, b, "the", n_ctx=N_CTX)
    with pytest.raises(OptionError, match="n_ctx is 513"):
        compare(a, b, TEXT, n_ctx=513)
    wide = write_tiny(tmp_path / "wide.gguf", n_extra_words=3)
    with (
        phi_c.load(wide) as other,
        pytest.raises(OptionError, match=r"a.gguf has \d+ logits per token and wide.gguf \d+"),
    ):
        compare(a, other, TEXT, n_ctx=N_CTX)
    renamed = tmp_path / "renamed.gguf"
    data = (a.path).read_bytes()
    assert data.count(b"\xe2\x96\x81ing") == 1
    renamed.write_bytes(data.replace(b"\xe2\x96\x81ing", b"\xe2\x96\x81qqq"))
    with (
        phi_c.load(renamed) as other,
        pytest.raises(OptionError, match="in a.gguf and .* in renamed.gguf: only models with the same vocabulary"),
    ):
        compare(a, other, TEXT, n_ctx=N_CTX)
    corrupt = tmp_path / "nan.gguf"
    corrupt.write_bytes(data[:-64] + np.full(16, np.nan, np.float32).tobytes())  # the weights of the last norm
    with phi_c.load(corrupt) as other, pytest.raises(PhiError, match="of a.gguf or nan.gguf are not finite"):
        compare(a, other, TEXT, n_ctx=N_CTX)
    flag = phi_c.CancelFlag()
    flag.set()
    with pytest.raises(Cancelled):
        compare(a, b, TEXT, n_ctx=N_CTX, cancel=flag)
