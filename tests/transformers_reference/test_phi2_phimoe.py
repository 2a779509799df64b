"""Logits of Phi-2 and Phi-3.5-MoE float32 files against transformers: NMSE of at most 1e-6 at every position."""

from typing import Any

import pytest
from converted_model import Convert
from test_against_transformers import N_CTX_ORIG, check_logits

from phi_c import _core
from reference_models import growing_factors


def moe(**changes: Any) -> dict[str, Any]:
    sizes = {"num_local_experts": 6, "intermediate_size": 96}
    return {**sizes, "attention_bias": True, "lm_head_bias": True, "rope_theta": 10000.0, **changes}


# With Phi-3.5-MoE's published attention factor, which differs from the formula's.
LONGROPE = {
    "type": "longrope",
    "short_factor": growing_factors(16, 1.5),
    "long_factor": growing_factors(16, 40.0),
    "short_mscale": 1.243163121016122,
    "long_mscale": 1.243163121016122,
    "original_max_position_embeddings": N_CTX_ORIG,
}

# Case -> family, tokenizer, configuration, sequence lengths.
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "phi2": ("Phi", "phi-2", {"num_key_value_heads": 4, "intermediate_size": 512}, (70,)),
    "phi2, head_dim 80, 32 rotary dims": (
        "Phi",
        "phi-2",
        {
            "hidden_size": 160,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 640,
            "partial_rotary_factor": 0.4,
        },
        (70,),
    ),
    "phi2, full rotary": ("Phi", "phi-2", {"num_key_value_heads": 4, "partial_rotary_factor": 1.0}, (70,)),
    "phi2, grouped-query attention": ("Phi", "phi-2", {}, (70,)),
    "phimoe": ("Phimoe", "phi-3", moe(), (1, 70)),
    "phimoe, two experts": ("Phimoe", "phi-3", moe(num_local_experts=2), (70,)),
    "phimoe, sixteen experts": ("Phimoe", "phi-3", moe(num_local_experts=16), (70,)),
    "phimoe, window": ("Phimoe", "phi-3", moe(sliding_window=24), (24, 25, 100)),
    "phimoe, LongRoPE": ("Phimoe", "phi-3", moe(rope_scaling=LONGROPE), (63, 64, 65, 100)),
}


@pytest.mark.parametrize("tier", _core.tiers())
@pytest.mark.parametrize("case", CASES)
def test_float32(converted: Convert, case: str, tier: str) -> None:
    family, tokenizer, config, lengths = CASES[case]
    check_logits(converted(family, tokenizer, config), lengths, tier)
