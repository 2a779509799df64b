"""Perplexity against NumPy, with windows implemented independently from their definitions."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import phi_c
from phi_c.errors import Cancelled, OptionError
from phi_c.evaluate import Perplexity, perplexity
from phi_c.evaluate.metrics import perplexity_of, standard_error
from phi_c.text.windows import strided
from reference import Reference
from tiny_gguf import write_tiny

TEXT = "the and in of it is on at or then there hand thing " * 14
ENGLISH = (Path(__file__).parents[1] / "english.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["spm", "bpe"])  # with BOS, without
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = "phi3" if request.param == "spm" else "llama"
    folder = tmp_path_factory.mktemp("model")
    return write_tiny(folder / "tiny.gguf", architecture, "F32", vocabulary=request.param)


@pytest.fixture
def llm(path: Path) -> Iterator[phi_c.LLM]:
    with phi_c.load(path, n_threads=2) as loaded:
        yield loaded


def nll(reference: Reference, tokens: list[int]) -> np.ndarray:
    """Return the negative log-likelihood of each token after the first."""
    logits = reference.logits(tokens)[:-1].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), tokens[1:]]).astype(np.float64)


def test_llama_cpp_windows(llm: phi_c.LLM, path: Path) -> None:
    """As llama.cpp's perplexity(): the logits at n_ctx / 2 .. n_ctx - 2 of each chunk, which begins with BOS."""
    ids, n_ctx = llm.tokenizer.encode(TEXT), 48
    reference = Reference(path)
    values = []
    for start in range(0, len(ids) // n_ctx * n_ctx, n_ctx):
        chunk = ids[start : start + n_ctx]
        if llm.tokenizer.add_bos:
            chunk[0] = llm.tokenizer.bos_id
        values.append(nll(reference, chunk)[n_ctx // 2 :])
    assert len(values) >= 3
    expected = np.concatenate(values)
    found = perplexity(llm, TEXT, n_ctx=n_ctx)
    assert (found.n_windows, found.n_tokens) == (len(values), len(expected))
    assert found.n_tokens == found.n_windows * (n_ctx - 1 - n_ctx // 2)
    assert found.nll == pytest.approx(expected.mean(), abs=1e-3)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    error = np.std([v.mean() for v in values], ddof=1) / math.sqrt(len(values))
    assert found.nll_standard_error == pytest.approx(error, rel=0.02)
    assert found.standard_error == pytest.approx(found.perplexity * found.nll_standard_error)
    first = perplexity(llm, TEXT, n_ctx=n_ctx, n_windows=1)
    assert first.nll == pytest.approx(values[0].mean(), abs=1e-3)
    assert math.isnan(first.standard_error)


@pytest.mark.parametrize(("n_ctx", "stride"), [(48, 16), (48, 47), (48, 48), (60, 1), (500, 100)])
def test_transformers_strided_windows(llm: phi_c.LLM, path: Path, n_ctx: int, stride: int) -> None:
    """The loop of the transformers guide: labels before the new part are masked, and the model shifts labels by one."""
    text = TEXT[:100] if stride == 1 else TEXT
    ids = llm.tokenizer.encode(text)
    reference = Reference(path)
    total, n_scored, sums, counts, previous = 0.0, 0, [], [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + n_ctx, len(ids))
        n_new = end - previous
        labels = np.asarray(ids[begin:end])
        labels[: len(labels) - n_new] = -100
        counted = labels[1:] != -100
        if counted.any():
            values = nll(reference, ids[begin:end])[counted]
            total, n_scored = total + values.sum(), n_scored + len(values)
            sums.append(values.sum())
            counts.append(len(values))
        previous = end
        if end == len(ids):
            break
    found = perplexity(llm, text, n_ctx=n_ctx, stride=stride)
    assert (found.n_windows, found.n_tokens) == (len(sums), n_scored)
    if stride < n_ctx:
        assert n_scored == len(ids) - 1
    assert found.nll == pytest.approx(total / n_scored, abs=1e-3)
    if len(sums) > 1:
        assert found.nll_standard_error == pytest.approx(standard_error(sums, counts), rel=0.02)


def test_strided_windows_score_every_token_once() -> None:
    for n, n_ctx, stride in ((10, 4, 1), (10, 4, 3), (11, 4, 2), (3, 8, 2), (9, 4, 4), (2, 2, 1)):
        ids = list(range(n))
        counted = [t for w in strided(ids, n_ctx, stride) for t in w.tokens[w.n_context :]]
        skipped = {0} if stride < n_ctx else set(range(0, n, n_ctx))
        assert counted == [i for i in ids if i not in skipped]
        assert all(1 <= w.n_context < len(w.tokens) <= n_ctx for w in strided(ids, n_ctx, stride))


def test_standard_error_of_correlated_windows() -> None:
    """The values of a window share a level, so the error of the mean is that of the levels, not of all values."""
    rng = np.random.default_rng(0)
    sums, counts, means, errors = [], [], [], []
    for _ in range(400):
        counts = rng.integers(5, 15, 30)
        levels = rng.normal(2, 1, 30)
        sums = [(level + rng.normal(0, 0.1, n)).sum() for level, n in zip(levels, counts, strict=True)]
        means.append(np.sum(sums) / counts.sum())
        errors.append(standard_error(sums, counts))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert math.isnan(standard_error([3.0], [2]))
    assert standard_error([2.0, 4.0], [1, 2]) == 0


def test_perplexity_of() -> None:
    assert perplexity_of(1.5) == pytest.approx(math.e**1.5)
    assert perplexity_of(1e4) == math.inf


def test_progress_reports_the_perplexity_so_far(llm: phi_c.LLM) -> None:
    seen: list[tuple[int, int, Perplexity]] = []
    found = perplexity(llm, TEXT, n_ctx=48, progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(1, found.n_windows + 1))
    assert {total for _, total, _ in seen} == {found.n_windows}
    assert seen[-1][2] == found
    # From the prefix cache the result is the same.
    assert perplexity(llm, TEXT, n_ctx=48).nll == pytest.approx(found.nll, abs=1e-12)


def test_invalid_options(llm: phi_c.LLM) -> None:
    n = len(llm.tokenizer.encode("the and"))
    with pytest.raises(OptionError, match=f"the text has {n} tokens, expected at least 48: 1 window of 48"):
        perplexity(llm, "the and", n_ctx=48)
    assert perplexity(llm, "the and", n_ctx=48, stride=20).n_tokens == n - 1
    with pytest.raises(OptionError, match=r"the text has \d tokens, expected at least 2"):
        perplexity(llm, "", stride=20)
    for n_ctx in (1, 513, 2.5, True):
        with pytest.raises(OptionError, match=f"n_ctx is {n_ctx}, expected an integer from 2 to 512"):
            perplexity(llm, TEXT, n_ctx=n_ctx)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="stride is 49, expected an integer from 1 to 48"):
        perplexity(llm, TEXT, n_ctx=48, stride=49)
    with pytest.raises(OptionError, match="n_windows is 0"):
        perplexity(llm, TEXT, n_windows=0)
    flag = phi_c.CancelFlag()
    flag.set()
    with pytest.raises(Cancelled):
        perplexity(llm, TEXT, n_ctx=48, cancel=flag)


@pytest.mark.exhaustive
def test_smollm2_on_english(smollm2_path: Path) -> None:
    """Int8 activations change the mean NLL by less than 0.01 nats from that of float32."""
    with phi_c.load(smollm2_path) as llm:
        ids = llm.tokenizer.encode(ENGLISH)
        found = perplexity(llm, ENGLISH, n_ctx=256, n_windows=1)
    reference = Reference(smollm2_path)
    expected = nll(reference, ids[:256])[128:]
    assert found.n_tokens == len(expected) == 127
    print(f"perplexity {found.perplexity:.3f}, float32 {np.exp(expected.mean()):.3f}")
    assert found.nll == pytest.approx(expected.mean(), abs=0.01)
