"""Logits against transformers: every position, tier and feature; float32 files within an NMSE of 1e-6."""

from typing import Any

import numpy as np
import pytest
from converted_model import Convert, Converted

from core.forward_helper import Runner
from phi_c import _core, llm
from reference_models import growing_factors, random_tokens, worst_nmse

LIMIT = 1e-6
N_CTX_ORIG = 64


def phi3(**changes: Any) -> dict[str, Any]:
    return {"original_max_position_embeddings": changes.pop("n_ctx_orig", 256), **changes}


def longrope(n_factors: int, **changes: Any) -> dict[str, Any]:
    short, long = growing_factors(n_factors, 1.5), growing_factors(n_factors, 40.0)
    rope = {"type": "longrope", "short_factor": short, "long_factor": long}
    return phi3(n_ctx_orig=N_CTX_ORIG, rope_scaling=rope, **changes)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Family, tokenizer, configuration, numbers of tokens.
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "phi3, every head its own keys": ("Phi3", "phi-3", phi3(num_key_value_heads=4), (70,)),
    "phi3, grouped keys": ("Phi3", "phi-4", phi3(rope_theta=250000.0), (70,)),
    "phi3, one key head, odd sizes": ("Phi3", "phi-3", phi3(num_key_value_heads=1, intermediate_size=200), (70,)),
    "phi3, window": ("Phi3", "phi-3", phi3(sliding_window=24), (24, 25, 100)),
    "phi3, window of one": ("Phi3", "phi-3", phi3(sliding_window=1), (10,)),
    "phi3, window as long as the context": ("Phi3", "phi-3", phi3(sliding_window=256), (100,)),
    "phi3, partial rotary": ("Phi3", "phi-4", phi3(partial_rotary_factor=0.5), (70,)),
    "phi3, tied": ("Phi3", "phi-4-mini", phi3(tie_word_embeddings=True), (70,)),
    "phi3, LongRoPE": ("Phi3", "phi-3", longrope(16), (40, 63, 64, 65, 100)),
    "phi3, LongRoPE, partial, tied, window": (
        "Phi3",
        "phi-4-mini",
        longrope(12, partial_rotary_factor=0.75, tie_word_embeddings=True, sliding_window=40),
        (64, 65, 100),
    ),
    "phi3, LongRoPE with a factor of its own": (
        "Phi3",
        "phi-3",
        {**longrope(16), "rope_scaling": {**longrope(16)["rope_scaling"], "attention_factor": 1.3}},
        (64, 100),
    ),
    "phi3, LongRoPE with a stretch of its own": (
        "Phi3",
        "phi-3",
        {**longrope(16), "rope_scaling": {**longrope(16)["rope_scaling"], "factor": 16.0}},
        (64, 100),
    ),
    "llama": ("Llama", "smollm2", {"rms_norm_eps": 1e-5}, (70,)),
    "llama, every head its own keys": ("Llama", "smollm2", {"num_key_value_heads": 4}, (70,)),
    "llama, tied, another base": ("Llama", "smollm2", {"tie_word_embeddings": True, "rope_theta": 1e5}, (70,)),
    "llama, heads of a size of their own": ("Llama", "smollm2", {"head_dim": 48}, (70,)),
    "llama, linear scaling": ("Llama", "smollm2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, (100,)),
    "llama, Llama 3's frequencies": (
        "Llama",
        "llama-3",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}, "rope_theta": 5e5},
        (70, 200),
    ),
}


@pytest.mark.parametrize("tier", _core.tiers())
@pytest.mark.parametrize("case", CASES)
def test_float32(converted: Convert, case: str, tier: str) -> None:
    family, kind, config, lengths = CASES[case]
    check(converted(family, kind, config), lengths, tier)


def check(model: Converted, lengths: tuple[int, ...], tier: str) -> None:
    """Compare the logits at every position of texts of these lengths."""
    runner = Runner(model.gguf, tier=tier)
    for n_tokens in lengths:
        tokens = random_tokens(n_tokens, model.n_tokens)
        expected = model.expected(tokens)
        long_rope = runner.config.long_rope and n_tokens > runner.config.n_ctx_orig
        got = runner.run(tokens, long_rope=long_rope)
        error = worst_nmse(got, expected)
        print(f"{tier}, {n_tokens} tokens: NMSE {error:.1e}")
        assert error <= LIMIT


# What a type of half the bits may cost: as much as its rounding, far below what a wrong model would.
HALF = {"f16": 1e-5, "bf16": 1e-3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outtype", HALF)
@pytest.mark.parametrize("case", ["phi3, window", "llama"])
def test_half_precision_files(converted: Convert, case: str, outtype: str, dtype: str) -> None:
    family, kind, config, _ = CASES[case]
    model = converted(family, kind, config, outtype=outtype, dtype=dtype)
    tokens = random_tokens(70, model.n_tokens)
    error = worst_nmse(Runner(model.gguf).run(tokens), model.expected(tokens))
    print(f"{dtype} as {outtype}: NMSE {error:.1e}")
    assert error <= HALF[outtype]
    if dtype == "bfloat16" and outtype == "bf16":  # nothing was rounded, but for the activations
        assert error <= 1e-5


def test_shards(converted: Convert) -> None:
    whole = converted("Phi3", "phi-3", CASES["phi3, window"][2])
    sharded = converted("Phi3", "phi-3", CASES["phi3, window"][2], shard="200KB")
    assert len(list(sharded.folder.glob("*.safetensors"))) > 2
    assert sharded.gguf.read_bytes() == whole.gguf.read_bytes()


def test_the_crossing_while_generating(converted: Convert) -> None:
    """Greedy text from below LongRoPE's original context to beyond it: each step is transformers' on the whole text."""
    family, kind, config, _ = CASES["phi3, LongRoPE"]
    model = converted(family, kind, config)
    prompt = random_tokens(N_CTX_ORIG - 4, model.n_tokens)
    with llm.load(model.gguf) as engine:
        answer = engine.generate(prompt, max_tokens=10, temperature=0, repeat_penalty=1.0, logprobs=0)
    tokens = list(prompt)
    assert answer.logprobs is not None
    for token, entry in zip(answer.tokens, answer.logprobs, strict=True):
        logits = model.expected(tokens)[-1].astype(np.float64)
        log_probs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert token == int(log_probs.argmax())
        assert entry.logprob == pytest.approx(log_probs[token], abs=2e-3)
        tokens.append(token)
    assert len(tokens) > N_CTX_ORIG + 4
