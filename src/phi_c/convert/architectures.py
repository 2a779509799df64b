"""What the tensors of each architecture are called on both sides: one table a class of transformers.

The first name of a row is GGUF's, as llama.cpp reads it; those after it are of transformers' modeling files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A tensor of the GGUF file and the tensors that it is made of, joined by rows.

    sources: (name, shape), shape being words of `Sizes.dims`; a name with {x} stands for one tensor an expert, which
    become the planes of one tensor. paired: the rows of each head are interleaved, from halves (i, i + half) to pairs
    (2 i, 2 i + 1). untied: absent where the embedding is the output. f32: stays so whatever type is asked for.
    """

    target: str
    sources: tuple[tuple[str, str], ...]
    paired: bool = False
    untied: bool = False
    f32: bool = False


@dataclass(frozen=True)
class Architecture:
    """name: general.architecture; classes: `architectures` in config.json; required: values of keys there."""

    name: str
    classes: tuple[str, ...]
    model: tuple[Row, ...]
    layer: tuple[Row, ...]  # targets below blk.N, sources below model.layers.N
    partial_rotary: float | None = 1.0  # share of a head that turns where config.json does not say; None: all of it
    rope_kinds: tuple[str, ...] = ("default", "longrope")
    activations: tuple[str, ...] = ("silu",)
    norm_key: str = "attention.layer_norm_rms_epsilon"
    norm_configs: tuple[str, ...] = ("rms_norm_eps",)
    required: Mapping[str, Any] = field(default_factory=dict)  # value where absent: the same
    has_window: bool = False
    is_moe: bool = False


def _row(target: str, *sources: str, **options: Any) -> Row:
    """Return a row of sources written as "name: shape"."""
    pairs = [source.partition(": ") for source in sources]
    return Row(target, tuple((name, shape) for name, _, shape in pairs), **options)


_EMBEDDING = _row("token_embd.weight", "model.embed_tokens.weight: vocab embd")
_NORM = _row("output_norm.weight", "model.norm.weight: embd")
_OUTPUT = _row("output.weight", "lm_head.weight: vocab embd", untied=True)
_ATTN_NORM = _row("attn_norm.weight", "input_layernorm.weight: embd")
_FFN_NORM = _row("ffn_norm.weight", "post_attention_layernorm.weight: embd")
_ATTN_OUTPUT = _row("attn_output.weight", "self_attn.o_proj.weight: embd q")

PHI3 = Architecture(
    "phi3",
    ("Phi3ForCausalLM",),
    model=(_EMBEDDING, _NORM, _OUTPUT),
    layer=(
        _ATTN_NORM,
        _row("attn_qkv.weight", "self_attn.qkv_proj.weight: qkv embd"),
        _ATTN_OUTPUT,
        _FFN_NORM,
        _row("ffn_up.weight", "mlp.gate_up_proj.weight: 2ffn embd"),
        _row("ffn_down.weight", "mlp.down_proj.weight: embd ffn"),
    ),
    has_window=True,
)

LLAMA = Architecture(
    "llama",
    ("LlamaForCausalLM",),
    model=(_EMBEDDING, _NORM, _OUTPUT),
    layer=(
        _ATTN_NORM,
        _row("attn_q.weight", "self_attn.q_proj.weight: q embd", paired=True),
        _row("attn_k.weight", "self_attn.k_proj.weight: k embd", paired=True),
        _row("attn_v.weight", "self_attn.v_proj.weight: k embd"),
        _ATTN_OUTPUT,
        _FFN_NORM,
        _row("ffn_gate.weight", "mlp.gate_proj.weight: ffn embd"),
        _row("ffn_up.weight", "mlp.up_proj.weight: ffn embd"),
        _row("ffn_down.weight", "mlp.down_proj.weight: embd ffn"),
    ),
    partial_rotary=None,
    rope_kinds=("default", "linear", "llama3"),
    required={"attention_bias": False, "mlp_bias": False},
)

PHI2 = Architecture(
    "phi2",
    ("PhiForCausalLM",),
    model=(
        _EMBEDDING,
        _row("output_norm.weight", "model.final_layernorm.weight: embd"),
        _row("output_norm.bias", "model.final_layernorm.bias: embd"),
        _OUTPUT,
        _row("output.bias", "lm_head.bias: vocab"),
    ),
    layer=(
        _ATTN_NORM,
        _row("attn_norm.bias", "input_layernorm.bias: embd"),
        _row("attn_qkv.weight", *(f"self_attn.{n}_proj.weight: {s} embd" for n, s in ("qq", "kk", "vk"))),
        _row("attn_qkv.bias", *(f"self_attn.{n}_proj.bias: {s}" for n, s in ("qq", "kk", "vk"))),
        _row("attn_output.weight", "self_attn.dense.weight: embd q"),
        _row("attn_output.bias", "self_attn.dense.bias: embd"),
        _row("ffn_up.weight", "mlp.fc1.weight: ffn embd"),
        _row("ffn_up.bias", "mlp.fc1.bias: ffn"),
        _row("ffn_down.weight", "mlp.fc2.weight: embd ffn"),
        _row("ffn_down.bias", "mlp.fc2.bias: embd"),
    ),
    partial_rotary=0.5,
    rope_kinds=("default",),
    activations=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # one function under three names
    norm_key="attention.layer_norm_epsilon",
    norm_configs=("layer_norm_eps", "layer_norm_epsilon"),
    required={"qk_layernorm": False},
)

PHIMOE = Architecture(
    "phimoe",
    ("PhimoeForCausalLM", "PhiMoEForCausalLM"),  # transformers' name, and the one that Microsoft published
    model=(
        _EMBEDDING,
        _NORM,
        _row("output_norm.bias", "model.norm.bias: embd"),
        _OUTPUT,
        _row("output.bias", "lm_head.bias: vocab"),
    ),
    layer=(
        _ATTN_NORM,
        _row("attn_norm.bias", "input_layernorm.bias: embd"),
        _row("attn_q.weight", "self_attn.q_proj.weight: q embd"),
        _row("attn_q.bias", "self_attn.q_proj.bias: q"),
        _row("attn_k.weight", "self_attn.k_proj.weight: k embd"),
        _row("attn_k.bias", "self_attn.k_proj.bias: k"),
        _row("attn_v.weight", "self_attn.v_proj.weight: k embd"),
        _row("attn_v.bias", "self_attn.v_proj.bias: k"),
        _ATTN_OUTPUT,
        _row("attn_output.bias", "self_attn.o_proj.bias: embd"),
        _FFN_NORM,
        _row("ffn_norm.bias", "post_attention_layernorm.bias: embd"),
        _row("ffn_gate_inp.weight", "block_sparse_moe.gate.weight: experts embd", f32=True),
        _row("ffn_gate_exps.weight", "block_sparse_moe.experts.{x}.w1.weight: ffn embd"),
        _row("ffn_up_exps.weight", "block_sparse_moe.experts.{x}.w3.weight: ffn embd"),
        _row("ffn_down_exps.weight", "block_sparse_moe.experts.{x}.w2.weight: embd ffn"),
    ),
    # GGUF has no key for SparseMixer's threshold and knows no more than two experts; llama.cpp insists on the biases.
    required={
        "router_jitter_noise": 0.01,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    partial_rotary=None,
    has_window=True,
    is_moe=True,
)

ARCHITECTURES = (PHI3, LLAMA, PHI2, PHIMOE)
