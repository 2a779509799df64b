"""Logits of Phi-2 and Phi-3.5-MoE against transformers: every position and tier, float32 within an NMSE of 1e-6."""

from typing import Any

import pytest
from converted_model import Convert
from test_against_transformers import N_CTX_ORIG, check

from phi_c import _core
from reference_models import growing_factors


def moe(**changes: Any) -> dict[str, Any]:
    sizes = {"num_local_experts": 6, "intermediate_size": 96}
    return {**sizes, "attention_bias": True, "lm_head_bias": True, "rope_theta": 10000.0, **changes}


# Phi-3.5-MoE's own factor on cos and sin, which is not what the formula gives.
LONGROPE = {
    "type": "longrope",
    "short_factor": growing_factors(16, 1.5),
    "long_factor": growing_factors(16, 40.0),
    "short_mscale": 1.243163121016122,
    "long_mscale": 1.243163121016122,
    "original_max_position_embeddings": N_CTX_ORIG,
}

# Family, tokenizer, configuration, numbers of tokens.
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "phi2": ("Phi", "phi-2", {"num_key_value_heads": 4, "intermediate_size": 512}, (70,)),
    "phi2, Phi-2's heads of 80, 32 of which turn": (
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
    "phi2, all of a head turns": ("Phi", "phi-2", {"num_key_value_heads": 4, "partial_rotary_factor": 1.0}, (70,)),
    "phi2, grouped keys": ("Phi", "phi-2", {}, (70,)),
    "phimoe": ("Phimoe", "phi-3", moe(), (1, 70)),
    "phimoe, two experts": ("Phimoe", "phi-3", moe(num_local_experts=2), (70,)),
    "phimoe, sixteen experts": ("Phimoe", "phi-3", moe(num_local_experts=16), (70,)),
    "phimoe, window": ("Phimoe", "phi-3", moe(sliding_window=24), (24, 25, 100)),
    "phimoe, LongRoPE": ("Phimoe", "phi-3", moe(rope_scaling=LONGROPE), (63, 64, 65, 100)),
}


@pytest.mark.parametrize("tier", _core.tiers())
@pytest.mark.parametrize("case", CASES)
def test_float32(converted: Convert, case: str, tier: str) -> None:
    family, kind, config, lengths = CASES[case]
    check(converted(family, kind, config), lengths, tier)
