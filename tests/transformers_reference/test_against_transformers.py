"""Logits of float32 files against transformers at every position: NMSE of at most 1e-6 for every tier and feature."""

from typing import Any

import numpy as np
import pytest
from converted_model import Convert, Converted

from core.forward_helper import Runner
from phi_c import _core, llm
from reference_models import growing_factors, random_tokens, worst_nmse

MAX_NMSE = 1e-6
N_CTX_ORIG = 64


def phi3(**changes: Any) -> dict[str, Any]:
    return {"original_max_position_embeddings": changes.pop("n_ctx_orig", 256), **changes}


def longrope(n_factors: int, **changes: Any) -> dict[str, Any]:
    short, long = growing_factors(n_factors, 1.5), growing_factors(n_factors, 40.0)
    rope = {"type": "longrope", "short_factor": short, "long_factor": long}
    return phi3(n_ctx_orig=N_CTX_ORIG, rope_scaling=rope, **changes)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Case -> family, tokenizer, configuration, sequence lengths.
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "phi3, multi-head attention": ("Phi3", "phi-3", phi3(num_key_value_heads=4), (70,)),
    "phi3, grouped-query attention": ("Phi3", "phi-4", phi3(rope_theta=250000.0), (70,)),
    "phi3, multi-query attention, n_ffn 200": (
        "Phi3",
        "phi-3",
        phi3(num_key_value_heads=1, intermediate_size=200),
        (70,),
    ),
    "phi3, window": ("Phi3", "phi-3", phi3(sliding_window=24), (24, 25, 100)),
    "phi3, window of 1": ("Phi3", "phi-3", phi3(sliding_window=1), (10,)),
    "phi3, window equal to the context": ("Phi3", "phi-3", phi3(sliding_window=256), (100,)),
    "phi3, partial rotary": ("Phi3", "phi-4", phi3(partial_rotary_factor=0.5), (70,)),
    "phi3, tied embedding": ("Phi3", "phi-4-mini", phi3(tie_word_embeddings=True), (70,)),
    "phi3, LongRoPE": ("Phi3", "phi-3", longrope(16), (40, 63, 64, 65, 100)),
    "phi3, LongRoPE, partial rotary, tied embedding, window": (
        "Phi3",
        "phi-4-mini",
        longrope(12, partial_rotary_factor=0.75, tie_word_embeddings=True, sliding_window=40),
        (64, 65, 100),
    ),
    "phi3, LongRoPE with attention_factor": (
        "Phi3",
        "phi-3",
        {**longrope(16), "rope_scaling": {**longrope(16)["rope_scaling"], "attention_factor": 1.3}},
        (64, 100),
    ),
    "phi3, LongRoPE with factor": (
        "Phi3",
        "phi-3",
        {**longrope(16), "rope_scaling": {**longrope(16)["rope_scaling"], "factor": 16.0}},
        (64, 100),
    ),
    "llama": ("Llama", "smollm2", {"rms_norm_eps": 1e-5}, (70,)),
    "llama, multi-head attention": ("Llama", "smollm2", {"num_key_value_heads": 4}, (70,)),
    "llama, tied, rope_theta 1e5": (
        "Llama",
        "smollm2",
        {"tie_word_embeddings": True, "rope_theta": 1e5},
        (70,),
    ),
    "llama, head_dim 48": ("Llama", "smollm2", {"head_dim": 48}, (70,)),
    "llama, linear scaling": (
        "Llama",
        "smollm2",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        (100,),
    ),
    "llama, Llama 3 scaling": (
        "Llama",
        "llama-3",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}, "rope_theta": 5e5},
        (70, 200),
    ),
}


@pytest.mark.parametrize("tier", _core.tiers())
@pytest.mark.parametrize("case", CASES)
def test_float32(converted: Convert, case: str, tier: str) -> None:
    family, tokenizer, config, lengths = CASES[case]
    check_logits(converted(family, tokenizer, config), lengths, tier)


def check_logits(model: Converted, lengths: tuple[int, ...], tier: str) -> None:
    """Compare the logits at every position of one random sequence per length."""
    runner = Runner(model.gguf, tier=tier)
    for n_tokens in lengths:
        tokens = random_tokens(n_tokens, model.n_tokens)
        expected = model.expected(tokens)
        long_rope = runner.config.long_rope and n_tokens > runner.config.n_ctx_orig
        got = runner.run(tokens, long_rope=long_rope)
        error = worst_nmse(got, expected)
        print(f"{tier}, {n_tokens} tokens: NMSE {error:.1e}")
        assert error <= MAX_NMSE


# Largest NMSE by output type: above the error of rounding the weights, far below that of a wrong computation.
MAX_HALF_NMSE = {"f16": 1e-5, "bf16": 1e-3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outtype", MAX_HALF_NMSE)
@pytest.mark.parametrize("case", ["phi3, window", "llama"])
def test_half_precision_files(converted: Convert, case: str, outtype: str, dtype: str) -> None:
    family, tokenizer, config, _ = CASES[case]
    model = converted(family, tokenizer, config, outtype=outtype, dtype=dtype)
    tokens = random_tokens(70, model.n_tokens)
    error = worst_nmse(Runner(model.gguf).run(tokens), model.expected(tokens))
    print(f"{dtype} as {outtype}: NMSE {error:.1e}")
    assert error <= MAX_HALF_NMSE[outtype]
    if dtype == "bfloat16" and outtype == "bf16":  # only activations are rounded
        assert error <= 1e-5


def test_shards_give_the_same_file(converted: Convert) -> None:
    single = converted("Phi3", "phi-3", CASES["phi3, window"][2])
    sharded = converted("Phi3", "phi-3", CASES["phi3, window"][2], shard="200KB")
    assert len(list(sharded.folder.glob("*.safetensors"))) > 2
    assert sharded.gguf.read_bytes() == single.gguf.read_bytes()


def test_generation_past_the_original_context(converted: Convert) -> None:
    """Greedy generation across LongRoPE's original context: each step equals transformers' on the whole sequence."""
    family, tokenizer, config, _ = CASES["phi3, LongRoPE"]
    model = converted(family, tokenizer, config)
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
