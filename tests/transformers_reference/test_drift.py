"""Logits beyond the sliding window and LongRoPE's original context equal transformers'; without them they drift.

llama.cpp runs phi3 files without a sliding window, and chooses LongRoPE's factors by the context size instead of the
sequence length. Both engines run the same file with the published models' window (2047) and original context (4096).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from converted_model import Convert, Converted
from llama_cpp import LlamaCpp, log_prob_nmse

from phi_c import llm
from reference_models import growing_factors, random_tokens, worst_nmse

WINDOW, N_CTX_ORIG = 2047, 4096
MAX_NMSE, MIN_DRIFT = 1e-6, 1e-2

# Published settings of Phi-3-mini-4k and -128k, with the same head_dim (96) but two heads and two layers.
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "original_max_position_embeddings": N_CTX_ORIG,
}
WINDOWED = {**SHAPE, "max_position_embeddings": 4096, "sliding_window": WINDOW}
FULL = {**SHAPE, "max_position_embeddings": 4096, "sliding_window": None}
LONG = {
    **SHAPE,
    "max_position_embeddings": 131072,
    "sliding_window": 262144,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": growing_factors(48, 1.5),
        "long_factor": growing_factors(48, 60.0),
    },
}


def phi_c_logits(model: Converted, tokens: list[int]) -> npt.NDArray[np.float32]:
    with llm.load(model.gguf, n_ctx=8192 if len(tokens) > 4000 else 4096) as engine:
        return engine.logits(tokens)


@pytest.fixture(scope="module")
def windowed(converted: Convert) -> Converted:
    return converted("Phi3", "phi-3", WINDOWED)


@pytest.fixture(scope="module")
def long_rope(converted: Convert) -> Converted:
    return converted("Phi3", "phi-3", LONG)


def test_beyond_the_window(windowed: Converted, converted: Convert) -> None:
    """All positions agree with transformers; without the window, logits differ from position 2047 onward."""
    tokens = random_tokens(WINDOW + 200, windowed.n_tokens)
    expected = windowed.expected(tokens)
    assert worst_nmse(phi_c_logits(windowed, tokens), expected) <= MAX_NMSE
    without_window = phi_c_logits(converted("Phi3", "phi-3", FULL), tokens)
    inside = worst_nmse(without_window[:WINDOW], expected[:WINDOW])
    outside = worst_nmse(without_window[WINDOW:], expected[WINDOW:])
    print(f"without the window: {inside:.1e} inside, {outside:.1e} outside")
    assert inside <= MAX_NMSE
    assert outside > 1e-4


def test_beyond_the_original_context(long_rope: Converted) -> None:
    """Sequences of 4096 tokens use the short factors, longer ones the long factors; with short factors they drift."""
    for n_tokens in (N_CTX_ORIG, N_CTX_ORIG + 1):
        tokens = random_tokens(n_tokens, long_rope.n_tokens)
        expected = long_rope.expected(tokens)
        assert worst_nmse(phi_c_logits(long_rope, tokens), expected) <= MAX_NMSE
    with llm.load(long_rope.gguf, n_ctx=8192, rope="short") as engine:
        with_short_factors = engine.logits(tokens)
    error = worst_nmse(with_short_factors, expected)
    print(f"short factors beyond the original context: {error:.1e}")
    assert error > MIN_DRIFT


@pytest.fixture(scope="module")
def short_context(windowed: Converted) -> LlamaCpp:
    return LlamaCpp(windowed.gguf, 4096)


@pytest.fixture(scope="module")
def long_context(long_rope: Converted) -> LlamaCpp:
    return LlamaCpp(long_rope.gguf, 8192)


def llama_cpp_error(model: Converted, llama_cpp: LlamaCpp, n_tokens: int) -> float:
    """Return the NMSE of llama.cpp's log-probabilities after n_tokens tokens; that of phi-c is at most MAX_NMSE."""
    tokens = random_tokens(n_tokens, model.n_tokens)
    expected = model.expected(tokens)[-1]
    theirs = log_prob_nmse(llama_cpp.log_probs(tokens, len(expected)), expected)
    ours = log_prob_nmse(phi_c_logits(model, tokens)[-1], expected)
    print(f"{n_tokens} tokens: llama.cpp {theirs:.1e}, phi-c {ours:.1e}")
    assert ours <= MAX_NMSE
    return theirs


@pytest.mark.parametrize("n_tokens", [100, WINDOW, WINDOW + 200])
def test_llama_cpp_beyond_the_window(windowed: Converted, short_context: LlamaCpp, n_tokens: int) -> None:
    theirs = llama_cpp_error(windowed, short_context, n_tokens)
    if n_tokens <= WINDOW:
        assert theirs <= 1e-4
    else:
        assert theirs > 1e-4


@pytest.mark.parametrize("n_tokens", [100, N_CTX_ORIG, N_CTX_ORIG + 1])
def test_llama_cpp_beyond_the_original_context(long_rope: Converted, long_context: LlamaCpp, n_tokens: int) -> None:
    theirs = llama_cpp_error(long_rope, long_context, n_tokens)
    if n_tokens > N_CTX_ORIG:
        assert theirs <= 1e-4
    else:
        assert theirs > MIN_DRIFT
