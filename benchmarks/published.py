"""The published models' settings (huggingface.co/REPO/blob/main/config.json), and small models with the same settings.

All settings that affect the computation are the published ones: rotary base, dimensions and scaling, sliding window,
context size, norm, tied embeddings, biases, head size. Only the numbers of layers, heads, expert columns and tokens are
smaller, and the LongRoPE factors are made up, in the published number. See `Published.config`.
"""

from dataclasses import dataclass, field
from typing import Any

from reference_models import growing_factors


@dataclass(frozen=True)
class Published:
    """A published model, a row of docs/models.md."""

    name: str
    repo: str
    family: str  # prefix of its transformers classes
    tokenizer: str  # kind in small_tokenizers.TOKENIZERS
    n_vocab: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    ffn: int
    n_ctx: int
    n_long_factors: int = 0  # number of LongRoPE factors, half the rotary dimensions; 0: no LongRoPE
    extra: dict[str, Any] = field(default_factory=dict)  # other keys of config.json, as published

    def config(self) -> dict[str, Any]:
        """Return the config.json of a small model: two layers, one group of query heads (or two heads without GQA)."""
        group = self.n_heads // self.n_kv_heads
        n_heads, n_kv_heads = (group, 1) if group > 1 else (2, 2)
        head_dim = self.hidden // self.n_heads
        config: dict[str, Any] = {
            "num_hidden_layers": 2,
            "hidden_size": n_heads * head_dim,
            "num_attention_heads": n_heads,
            "num_key_value_heads": n_kv_heads,
            "intermediate_size": max(self.ffn * n_heads * head_dim // self.hidden // 32, 1) * 32,
            "max_position_embeddings": self.n_ctx,
            **self.extra,
        }
        if self.n_long_factors:
            config["rope_scaling"] = {
                "type": "longrope",
                "short_factor": growing_factors(self.n_long_factors, 1.5),
                "long_factor": growing_factors(self.n_long_factors, 60.0),
                **self.extra.get("rope_scaling", {}),
            }
        return config

    def lengths(self) -> tuple[int, ...]:
        """Return the sequence lengths to compare: beyond the window; up to and beyond LongRoPE's original context."""
        window = self.extra.get("sliding_window") or 0
        if self.n_long_factors:
            return 4096, 4097
        return (window + 200,) if 0 < window < self.n_ctx else (300,)


_PHI3 = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "original_max_position_embeddings": 4096}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MSCALE = 1.243163121016122  # of Phi-3.5-MoE


def _shape(n_vocab: int, hidden: int, n_heads: int, n_kv_heads: int, ffn: int) -> dict[str, Any]:
    return {"n_vocab": n_vocab, "hidden": hidden, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "ffn": ffn}


_MINI = _shape(32064, 3072, 32, 32, 8192)
_MEDIUM = _shape(32064, 5120, 40, 10, 17920)


def _phi3(name: str, shape: dict[str, Any], n_ctx: int, window: int, n_long_factors: int = 0) -> Published:
    """Return the row of a Phi-3 or Phi-3.5 model without experts; these differ only in the arguments."""
    return Published(
        name,
        f"microsoft/{name}-instruct",
        "Phi3",
        "phi-3",
        **shape,
        n_ctx=n_ctx,
        n_long_factors=n_long_factors,
        extra={**_PHI3, "sliding_window": window},
    )


PUBLISHED = (
    _phi3("Phi-3-mini-4k", _MINI, 4096, 2047),
    _phi3("Phi-3-mini-128k", _MINI, 131072, 262144, n_long_factors=48),
    _phi3("Phi-3-medium-4k", _MEDIUM, 4096, 2047),
    _phi3("Phi-3-medium-128k", _MEDIUM, 131072, 131072, n_long_factors=64),
    _phi3("Phi-3.5-mini", _MINI, 131072, 262144, n_long_factors=48),
    Published(
        *("Phi-4", "microsoft/phi-4", "Phi3", "phi-4"),
        **{**_MEDIUM, "n_vocab": 100352},
        n_ctx=16384,
        extra={"rms_norm_eps": 1e-5, "rope_theta": 250000.0, "original_max_position_embeddings": 16384},
    ),
    Published(
        *("Phi-4-mini", "microsoft/Phi-4-mini-instruct", "Phi3", "phi-4-mini"),
        **_shape(200064, 3072, 24, 8, 8192),
        n_ctx=131072,
        n_long_factors=48,
        extra={**_PHI3, "sliding_window": 262144, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    ),
    Published(
        *("Phi-3.5-MoE", "microsoft/Phi-3.5-MoE-instruct", "Phimoe", "phi-3"),
        **_shape(32064, 4096, 32, 8, 640),  # 640 columns per expert; published: 6400
        n_ctx=131072,
        n_long_factors=64,
        extra={
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 131072,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_scaling": {
                "short_mscale": _MSCALE,
                "long_mscale": _MSCALE,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    Published(
        *("Phi-2", "microsoft/phi-2", "Phi", "phi-2"),
        **_shape(51200, 2560, 32, 32, 10240),
        n_ctx=2048,
        extra={"layer_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    ),
    Published(
        *("SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "Llama", "smollm2"),
        **_shape(49152, 576, 9, 3, 1536),
        n_ctx=8192,
        extra={"rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True},
    ),
    Published(
        *("Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct", "Llama", "llama-3"),
        **_shape(128256, 2048, 32, 8, 8192),
        n_ctx=131072,
        extra={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "rope_scaling": _LLAMA3},
    ),
)
