"""Past the window and past the original context logits stay transformers'; those of an engine without either drift.

llama.cpp runs phi3 files without a window, and chooses LongRoPE's factors by the context that it is given rather than
by the text. The same file is run by both, at the lengths of the published models: 2047 and 4096.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from converted_model import Convert, Converted
from llama_cpp import LlamaCpp, distance

from phi_c import llm
from reference_models import growing_factors, random_tokens, worst_nmse

WINDOW, N_CTX_ORIG = 2047, 4096
SAME, DRIFTED = 1e-6, 1e-2

# Published settings of Phi-3-mini-4k and -128k, heads of 96 as theirs, but two of them and two layers.
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


def ours(model: Converted, tokens: list[int]) -> npt.NDArray[np.float32]:
    with llm.load(model.gguf, n_ctx=8192 if len(tokens) > 4000 else 4096) as engine:
        return engine.logits(tokens)


@pytest.fixture(scope="module")
def windowed(converted: Convert) -> Converted:
    return converted("Phi3", "phi-3", WINDOWED)


@pytest.fixture(scope="module")
def long(converted: Convert) -> Converted:
    return converted("Phi3", "phi-3", LONG)


def test_past_the_window(windowed: Converted, converted: Convert) -> None:
    """At every position of a text beyond it; the same weights without the window drift from its first position on."""
    tokens = random_tokens(WINDOW + 200, windowed.n_tokens)
    expected = windowed.expected(tokens)
    assert worst_nmse(ours(windowed, tokens), expected) <= SAME
    without = ours(converted("Phi3", "phi-3", FULL), tokens)
    inside = worst_nmse(without[:WINDOW], expected[:WINDOW])
    outside = worst_nmse(without[WINDOW:], expected[WINDOW:])
    print(f"without the window: {inside:.1e} inside, {outside:.1e} outside")
    assert inside <= SAME
    assert outside > 1e-4


def test_past_the_original_context(long: Converted) -> None:
    """Short factors up to 4096 tokens, long ones with the next; taking the others drifts."""
    for n_tokens in (N_CTX_ORIG, N_CTX_ORIG + 1):
        tokens = random_tokens(n_tokens, long.n_tokens)
        expected = long.expected(tokens)
        assert worst_nmse(ours(long, tokens), expected) <= SAME
    with llm.load(long.gguf, n_ctx=8192, rope="short") as engine:
        other = engine.logits(tokens)
    error = worst_nmse(other, expected)
    print(f"short factors beyond the original context: {error:.1e}")
    assert error > DRIFTED


@pytest.fixture(scope="module")
def short_context(windowed: Converted) -> LlamaCpp:
    return LlamaCpp(windowed.gguf, 4096)


@pytest.fixture(scope="module")
def long_context(long: Converted) -> LlamaCpp:
    return LlamaCpp(long.gguf, 8192)


@pytest.mark.parametrize("n_tokens", [100, WINDOW, WINDOW + 200])
def test_llama_cpp_past_the_window(windowed: Converted, short_context: LlamaCpp, n_tokens: int) -> None:
    tokens = random_tokens(n_tokens, windowed.n_tokens)
    expected = windowed.expected(tokens)[-1]
    theirs = distance(short_context.log_probs(tokens, len(expected)), expected)
    mine = distance(ours(windowed, tokens)[-1], expected)
    print(f"{n_tokens} tokens: llama.cpp {theirs:.1e}, phi-c {mine:.1e}")
    assert mine <= SAME
    if n_tokens <= WINDOW:
        assert theirs <= 1e-4
    else:
        assert theirs > 1e-4


@pytest.mark.parametrize("n_tokens", [100, N_CTX_ORIG, N_CTX_ORIG + 1])
def test_llama_cpp_past_the_original_context(long: Converted, long_context: LlamaCpp, n_tokens: int) -> None:
    tokens = random_tokens(n_tokens, long.n_tokens)
    expected = long.expected(tokens)[-1]
    theirs = distance(long_context.log_probs(tokens, len(expected)), expected)
    mine = distance(ours(long, tokens)[-1], expected)
    print(f"{n_tokens} tokens: llama.cpp {theirs:.1e}, phi-c {mine:.1e}")
    assert mine <= SAME
    if n_tokens > N_CTX_ORIG:
        assert theirs <= 1e-4
    else:
        assert theirs > DRIFTED
