"""Converted Phi-3.5-MoE tensors against transformers' parameters, and converted Phi-2 files in llama.cpp."""

from typing import Any

import numpy as np
import torch
import transformers
from converted_model import Convert
from llama_cpp import LlamaCpp, log_prob_nmse

import gguf
from reference_models import random_tokens

MOE: dict[str, Any] = {
    "num_local_experts": 4,
    "attention_bias": True,
    "lm_head_bias": True,
    "intermediate_size": 96,
}
PHI2: dict[str, Any] = {
    "partial_rotary_factor": 0.4,
    "hidden_size": 160,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
}


def test_expert_tensors(converted: Convert) -> None:
    """Gate, up and down of each expert equal transformers' parameters; the router is float32."""
    model = converted("Phimoe", "phi-3", MOE, dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    tensors = {t.name: t for t in gguf.GGUFReader(model.gguf).tensors}

    def ours(name: str) -> Any:
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    for i, layer in enumerate(theirs.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj.detach().numpy().reshape(4, 2, 96, 128).swapaxes(0, 1)
        assert np.array_equal(ours(f"blk.{i}.ffn_gate_exps.weight"), gate)
        assert np.array_equal(ours(f"blk.{i}.ffn_up_exps.weight"), up)
        assert np.array_equal(ours(f"blk.{i}.ffn_down_exps.weight"), layer.mlp.experts.down_proj.detach().numpy())
        router = f"blk.{i}.ffn_gate_inp.weight"
        assert tensors[router].tensor_type.name == "F32"
        assert np.array_equal(ours(router), layer.mlp.router.weight.detach().numpy())
        assert np.array_equal(ours(f"blk.{i}.attn_k.bias"), layer.self_attn.k_proj.bias.detach().numpy())
    assert np.array_equal(ours("output.bias"), theirs.lm_head.bias.detach().numpy())


def test_phi2_in_llama_cpp(converted: Convert) -> None:
    model = converted("Phi", "phi-2", PHI2, n_unused=0)
    engine = LlamaCpp(model.gguf, 256)
    for seed in range(4):
        tokens = random_tokens(30, model.n_tokens, seed)
        assert log_prob_nmse(engine.log_probs(tokens, model.n_tokens), model.expected(tokens)[-1]) <= 1e-6
