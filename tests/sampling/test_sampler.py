"""Sampling: the distribution of the drawn tokens for each option, and log-probabilities."""

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from phi_c.errors import OptionError, PhiError
from phi_c.sampling.params import SamplingParams
from phi_c.sampling.sampler import Sampler, logprob

OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
PROBABILITIES = np.asarray([0.05, 0.5, 0.15, 0.3])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def frequencies(n: int = 4000, **options: Any) -> npt.NDArray[np.float64]:
    sampler = Sampler(SamplingParams(**{**OFF, "seed": 1, **options}), len(LOGITS))
    counts = Counter(sampler.sample(LOGITS, []) for _ in range(n))
    return np.asarray([counts[i] / n for i in range(len(LOGITS))])


def assert_distribution(drawn: npt.NDArray[np.float64], expected: list[float]) -> None:
    weights = np.asarray(expected) / sum(expected)
    assert (drawn[weights == 0] == 0).all()
    np.testing.assert_allclose(drawn, weights, atol=0.03)


def test_plain_sampling_draws_the_distribution() -> None:
    assert_distribution(frequencies(), list(PROBABILITIES))


def test_temperature_sharpens() -> None:
    assert_distribution(frequencies(temperature=0.5), list(PROBABILITIES**2))


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-60])
def test_zero_or_tiny_temperature_is_argmax(temperature: float) -> None:
    assert_distribution(frequencies(50, temperature=temperature), [0, 1, 0, 0])


def test_top_k() -> None:
    assert_distribution(frequencies(top_k=2), [0, 0.5, 0, 0.3])
    assert_distribution(frequencies(top_k=99), list(PROBABILITIES))


def test_top_p_keeps_the_token_that_crosses() -> None:
    assert_distribution(frequencies(top_p=0.6), [0, 0.5, 0, 0.3])
    assert_distribution(frequencies(top_p=0.4), [0, 1, 0, 0])
    assert_distribution(frequencies(top_p=0.9), [0, 0.5, 0.15, 0.3])


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.0, 3.0])
def test_top_p_outside_its_range_is_plain_sampling(top_p: float) -> None:
    assert_distribution(frequencies(top_p=top_p), list(PROBABILITIES))


def test_min_p_is_relative_to_the_most_probable_token() -> None:
    assert_distribution(frequencies(min_p=0.2), [0, 0.5, 0.15, 0.3])


def test_top_p_of_many_candidates() -> None:
    """More candidates than are sorted at once, with nearly equal probabilities: none is lost."""
    n = 5000
    logits = np.linspace(0, 0.01, n).astype(np.float32)
    sampler = Sampler(SamplingParams(**{**OFF, "top_p": 0.9, "seed": 3}), n)
    drawn = [sampler.sample(logits, []) for _ in range(2000)]
    assert min(drawn) >= n * 0.09
    assert min(drawn) < n * 0.13
    assert max(drawn) > n * 0.99


def test_repeat_penalty_over_unique_recent_tokens() -> None:
    """Divides logits of at least 0 and multiplies the others, once per token regardless of its occurrences."""
    logits = np.asarray([2.0, 1.9, -1.0, -1.1], np.float32)
    greedy = {**OFF, "temperature": 0.0}
    assert Sampler(SamplingParams(**{**greedy, "repeat_penalty": 1.2}), 4).sample(logits, [0, 0, 0]) == 1
    assert Sampler(SamplingParams(**{**greedy, "repeat_penalty": 1.04}), 4).sample(logits, [0, 0, 0]) == 0
    adjusted = Sampler(SamplingParams(**{**greedy, "repeat_penalty": 2.0}), 4)._adjust_logits(logits, [0, 2])
    np.testing.assert_allclose(adjusted, [1.0, 1.9, -2.0, -1.1])
    np.testing.assert_allclose(logits, [2.0, 1.9, -1.0, -1.1])


def test_repeat_last_n_limits_the_penalties() -> None:
    logits = np.asarray([2.0, 1.0, 0.0], np.float32)
    for last_n, expected in ((1, 0), (2, 1), (-1, 1), (0, 0)):
        params = SamplingParams(**{**OFF, "temperature": 0.0, "presence_penalty": 1.5, "repeat_last_n": last_n})
        assert Sampler(params, 3).sample(logits, [0, 2]) == expected


def test_frequency_penalty_applies_per_occurrence() -> None:
    params = SamplingParams(**{**OFF, "temperature": 0.0, "frequency_penalty": 0.4})
    logits = np.asarray([2.0, 1.0], np.float32)
    assert Sampler(params, 2).sample(logits, [0, 0]) == 0
    assert Sampler(params, 2).sample(logits, [0, 0, 0]) == 1


def test_logit_bias() -> None:
    assert_distribution(frequencies(50, temperature=0.0, logit_bias={1: -math.inf}), [0, 0, 0, 1])
    assert_distribution(frequencies(50, temperature=0.0, logit_bias={0: 10.0}), [1, 0, 0, 0])
    with pytest.raises(OptionError, match="logit_bias names token 4, expected ids of 0 to 3"):
        Sampler(SamplingParams(logit_bias={4: 1.0}), 4)


def test_same_seed_draws_the_same_tokens() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(**{**OFF, "seed": seed}), 4)
        return [sampler.sample(LOGITS, []) for _ in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_finite_maximum(temperature: float) -> None:
    sampler = Sampler(SamplingParams(**{**OFF, "temperature": temperature}), 3)
    for bad in ([1.0, np.nan, 0.0], [-np.inf] * 3):
        with pytest.raises(PhiError, match="the logits hold"):
            sampler.sample(np.asarray(bad, np.float32), [])


def test_logprobs_ignore_sampling_options() -> None:
    result = logprob(LOGITS, 2, 2)
    assert result.logprob == pytest.approx(math.log(0.15), abs=1e-6)
    assert [token for token, _ in result.top] == [1, 3]
    assert result.top[0][1] == pytest.approx(math.log(0.5), abs=1e-6)
    assert logprob(LOGITS, 0, 0).top == ()
    assert len(logprob(LOGITS, 0, 99).top) == 4


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 40}, {"min_p": 0.0}, {"top_p": 1.0, "min_p": 0.0}, {"top_k": 40, "top_p": 1.0}]
)
def test_large_vocabularies_are_not_sorted(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    n_vocab = 200_064  # Phi-4-mini
    n_sorted = []
    argsort = np.argsort

    def counting_argsort(values: npt.NDArray[np.float32], **keywords: Any) -> npt.NDArray[np.int64]:
        n_sorted.append(len(values))
        return argsort(values, **keywords)

    monkeypatch.setattr(np, "argsort", counting_argsort)
    logits = np.random.default_rng(0).normal(0, 3, n_vocab).astype(np.float32)
    sampler = Sampler(SamplingParams(seed=0, **options), n_vocab)
    for _ in range(10):
        sampler.sample(logits, [1, 2, 3])
    logprob(logits, 0, 5)
    assert max(n_sorted) < n_vocab // 20


def sample_by_sorting(logits: npt.NDArray[np.float32], params: SamplingParams, draw: float) -> int:
    """Return the token that the definitions of the options give: sort the whole vocabulary. draw: 0 to 1."""
    top = logits.max()
    weights = np.exp((logits - top) / np.float32(params.temperature))
    ids = np.lexsort((np.arange(len(logits)), -logits))[: params.top_k or None]
    ids = ids[weights[ids] >= params.min_p]
    if 0 < params.top_p < 1:
        cumulative = np.cumsum(weights[ids], dtype=np.float64)
        ids = ids[: np.searchsorted(cumulative, params.top_p * cumulative[-1]) + 1]
    elif not params.top_k:
        ids = np.sort(ids)
    cumulative = np.cumsum(weights[ids], dtype=np.float64)
    return int(ids[np.searchsorted(cumulative, draw * cumulative[-1], side="right")])


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("top_k", [0, 40, 2000])
@pytest.mark.parametrize("deviation", [0.0, 0.01, 3.0])
def test_same_tokens_as_by_sorting(deviation: float, top_k: int, min_p: float, top_p: float) -> None:
    """For few and many candidates, ties included."""
    rng = np.random.default_rng(1)
    for n in (40, 5000, 40_000):
        logits = rng.normal(0, deviation, n).astype(np.float32)
        logits[rng.integers(0, n, n // 2)] = logits[0]
        params = SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=1.0, seed=2)
        sampler, draws = Sampler(params, n), np.random.Generator(np.random.PCG64(2))
        for _ in range(10):
            assert sampler.sample(logits, []) == sample_by_sorting(logits, params, draws.random())


@pytest.mark.parametrize("n_top", [1, 5, 300, 40_000])
def test_top_logprobs_of_a_large_vocabulary(n_top: int) -> None:
    logits = np.random.default_rng(0).normal(0, 3, 40_000).astype(np.float32).round(2)
    expected = np.lexsort((np.arange(len(logits)), -logits))[:n_top]
    assert [token for token, _ in logprob(logits, 0, n_top).top] == list(expected)
