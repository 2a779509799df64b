"""The architectures that phi-c runs and converts: one row each, read by model/config.py and by convert/.

GGUF names and keys are those of the GGUF specification and llama.cpp; names in `sources`, `transformers_classes` and
`*_config*` are those of transformers' modeling files and config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

RopeStyle: TypeAlias = Literal["neox", "interleaved"]
NormKind: TypeAlias = Literal["rms", "layer"]
Activation: TypeAlias = Literal["swiglu", "gelu"]
ModelSize: TypeAlias = tuple[int, int]  # (n_embd, n_ctx_train), which identifies a published model

EXPERTS_USED = 2  # experts per token: SparseMixer chooses exactly two


@dataclass(frozen=True)
class TensorRow:
    """A tensor of the GGUF file and the safetensors tensors that it is converted from, concatenated by rows.

    name: GGUF name, without `blk.N.` for the tensors of a layer.
    sources: (name, shape) of each source tensor, without `model.layers.N.` for those of a layer. The shape is written
        in the words of `convert.plan.Sizes.dims`. A name with {expert} stands for one matrix per expert; they are
        stacked to a tensor [n_experts, n_rows, n_cols].
    interleaved: the rows of each head are permuted from the NeoX order (i, i + half) to pairs (2 i, 2 i + 1).
    untied_only: absent where the embedding is also the output matrix.
    always_f32: float32 whatever output type the user chose.
    """

    name: str
    sources: tuple[tuple[str, str], ...]
    interleaved: bool = False
    untied_only: bool = False
    always_f32: bool = False


@dataclass(frozen=True)
class Architecture:
    """What differs between architectures, at run time and in conversion.

    Run time:
    name: value of `general.architecture`.
    rope_style: neox rotates element i with i + rope_dims / 2; interleaved rotates 2 i with 2 i + 1.
    fused_qkv: blk.N.attn_qkv holds the rows of q, k and v, in this order; None: the file decides.
    fused_gate_up: blk.N.ffn_up holds the rows of gate and up, in this order.
    norm: "rms" (RMSNorm) or "layer" (LayerNorm, with bias).
    eps_key: GGUF key of the norm's epsilon.
    activation: "swiglu", or "gelu", which has no gate matrix.
    is_parallel: attention and feed-forward read the same normed input, so there is no ffn_norm.
    has_experts: a router chooses EXPERTS_USED feed-forwards for each token.
    has_biases: attention and output matrices may have biases; those of a gelu feed-forward always have.
    published_windows: sliding window in the published config.json of models whose GGUF files omit it.
    published_windows_n_vocab: published_windows applies only to files with this vocabulary size; None: to all.
    published_mscales: LongRoPE attention factor in the published config.json of models whose GGUF files may omit it.

    Conversion:
    transformers_classes: values of `architectures` in config.json.
    model_tensors, layer_tensors: rows for the model and for each layer.
    partial_rotary: fraction of a head that is rotated where config.json does not specify it; None: always all of it.
    rope_kinds: supported `rope_type` values.
    hidden_acts: supported `hidden_act` values; the first is the default.
    config_eps_keys: config.json keys of the norm's epsilon; the first one found is used.
    required_config: config.json keys that must have this value or be absent.
    has_window: the GGUF file gets attention.sliding_window and rope.scaling.original_context_length.
    """

    name: str
    transformers_classes: tuple[str, ...]
    rope_style: RopeStyle
    fused_qkv: bool | None
    fused_gate_up: bool
    model_tensors: tuple[TensorRow, ...]
    layer_tensors: tuple[TensorRow, ...]
    norm: NormKind = "rms"
    eps_key: str = "attention.layer_norm_rms_epsilon"
    config_eps_keys: tuple[str, ...] = ("rms_norm_eps",)
    activation: Activation = "swiglu"
    hidden_acts: tuple[str, ...] = ("silu",)
    partial_rotary: float | None = 1.0
    rope_kinds: tuple[str, ...] = ("default", "longrope")
    required_config: Mapping[str, Any] = field(default_factory=dict)
    is_parallel: bool = False
    has_experts: bool = False
    has_biases: bool = False
    has_window: bool = False
    published_windows: Mapping[ModelSize, int] = field(default_factory=dict)
    published_windows_n_vocab: int | None = None
    published_mscales: Mapping[ModelSize, float] = field(default_factory=dict)


def _row(name: str, *sources: str, **options: Any) -> TensorRow:
    """Return a row whose sources are written as "name: shape"."""
    pairs = [source.partition(": ") for source in sources]
    return TensorRow(name, tuple((source, shape) for source, _, shape in pairs), **options)


_EMBEDDING = _row("token_embd.weight", "model.embed_tokens.weight: vocab embd")
_OUTPUT_NORM = _row("output_norm.weight", "model.norm.weight: embd")
_OUTPUT = _row("output.weight", "lm_head.weight: vocab embd", untied_only=True)
_ATTN_NORM = _row("attn_norm.weight", "input_layernorm.weight: embd")
_ATTN_OUTPUT = _row("attn_output.weight", "self_attn.o_proj.weight: embd q")
_FFN_NORM = _row("ffn_norm.weight", "post_attention_layernorm.weight: embd")

# The 128k models' windows (262144 and 131072) cover their whole context, and Phi-4 and Phi-4-mini have none, so none of
# them needs a row. llama.cpp's phi3 loader assumes the same values.
_PHI3_WINDOWS = {
    (3072, 4096): 2047,  # Phi-3-mini-4k
    (5120, 4096): 2047,  # Phi-3-medium-4k
}

_PHI3 = Architecture(
    name="phi3",
    transformers_classes=("Phi3ForCausalLM",),
    rope_style="neox",
    fused_qkv=True,
    fused_gate_up=True,
    model_tensors=(_EMBEDDING, _OUTPUT_NORM, _OUTPUT),
    layer_tensors=(
        _ATTN_NORM,
        _row("attn_qkv.weight", "self_attn.qkv_proj.weight: qkv embd"),
        _ATTN_OUTPUT,
        _FFN_NORM,
        _row("ffn_up.weight", "mlp.gate_up_proj.weight: 2ffn embd"),
        _row("ffn_down.weight", "mlp.down_proj.weight: embd ffn"),
    ),
    has_window=True,
    published_windows=_PHI3_WINDOWS,
)

_LLAMA = Architecture(
    name="llama",
    transformers_classes=("LlamaForCausalLM",),
    rope_style="interleaved",
    fused_qkv=False,
    fused_gate_up=False,
    model_tensors=(_EMBEDDING, _OUTPUT_NORM, _OUTPUT),
    layer_tensors=(
        _ATTN_NORM,
        _row("attn_q.weight", "self_attn.q_proj.weight: q embd", interleaved=True),
        _row("attn_k.weight", "self_attn.k_proj.weight: kv embd", interleaved=True),
        _row("attn_v.weight", "self_attn.v_proj.weight: kv embd"),
        _ATTN_OUTPUT,
        _FFN_NORM,
        _row("ffn_gate.weight", "mlp.gate_proj.weight: ffn embd"),
        _row("ffn_up.weight", "mlp.up_proj.weight: ffn embd"),
        _row("ffn_down.weight", "mlp.down_proj.weight: embd ffn"),
    ),
    partial_rotary=None,
    rope_kinds=("default", "linear", "llama3"),
    required_config={"attention_bias": False, "mlp_bias": False},
    # Some Phi-3 files are converted as llama. Other llama models have the same sizes but not Phi-3's vocabulary.
    published_windows=_PHI3_WINDOWS,
    published_windows_n_vocab=32064,
)

_PHI2 = Architecture(
    name="phi2",
    transformers_classes=("PhiForCausalLM",),
    rope_style="neox",
    fused_qkv=None,
    fused_gate_up=False,
    model_tensors=(
        _EMBEDDING,
        _row("output_norm.weight", "model.final_layernorm.weight: embd"),
        _row("output_norm.bias", "model.final_layernorm.bias: embd"),
        _OUTPUT,
        _row("output.bias", "lm_head.bias: vocab"),
    ),
    layer_tensors=(
        _ATTN_NORM,
        _row("attn_norm.bias", "input_layernorm.bias: embd"),
        _row(
            "attn_qkv.weight",
            "self_attn.q_proj.weight: q embd",
            "self_attn.k_proj.weight: kv embd",
            "self_attn.v_proj.weight: kv embd",
        ),
        _row("attn_qkv.bias", "self_attn.q_proj.bias: q", "self_attn.k_proj.bias: kv", "self_attn.v_proj.bias: kv"),
        _row("attn_output.weight", "self_attn.dense.weight: embd q"),
        _row("attn_output.bias", "self_attn.dense.bias: embd"),
        _row("ffn_up.weight", "mlp.fc1.weight: ffn embd"),
        _row("ffn_up.bias", "mlp.fc1.bias: ffn"),
        _row("ffn_down.weight", "mlp.fc2.weight: embd ffn"),
        _row("ffn_down.bias", "mlp.fc2.bias: embd"),
    ),
    norm="layer",
    eps_key="attention.layer_norm_epsilon",
    config_eps_keys=("layer_norm_eps", "layer_norm_epsilon"),
    activation="gelu",
    hidden_acts=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # three names of the tanh approximation
    partial_rotary=0.5,
    rope_kinds=("default",),
    required_config={"qk_layernorm": False},
    is_parallel=True,
    has_biases=True,
)

# LayerNorm and SparseMixer as in transformers, although the key of its epsilon is RMSNorm's.
_PHIMOE = Architecture(
    name="phimoe",
    transformers_classes=("PhimoeForCausalLM", "PhiMoEForCausalLM"),  # transformers' class; the published config.json
    rope_style="neox",
    fused_qkv=False,
    fused_gate_up=False,
    model_tensors=(
        _EMBEDDING,
        _OUTPUT_NORM,
        _row("output_norm.bias", "model.norm.bias: embd"),
        _OUTPUT,
        _row("output.bias", "lm_head.bias: vocab"),
    ),
    layer_tensors=(
        _ATTN_NORM,
        _row("attn_norm.bias", "input_layernorm.bias: embd"),
        _row("attn_q.weight", "self_attn.q_proj.weight: q embd"),
        _row("attn_q.bias", "self_attn.q_proj.bias: q"),
        _row("attn_k.weight", "self_attn.k_proj.weight: kv embd"),
        _row("attn_k.bias", "self_attn.k_proj.bias: kv"),
        _row("attn_v.weight", "self_attn.v_proj.weight: kv embd"),
        _row("attn_v.bias", "self_attn.v_proj.bias: kv"),
        _ATTN_OUTPUT,
        _row("attn_output.bias", "self_attn.o_proj.bias: embd"),
        _FFN_NORM,
        _row("ffn_norm.bias", "post_attention_layernorm.bias: embd"),
        _row("ffn_gate_inp.weight", "block_sparse_moe.gate.weight: experts embd", always_f32=True),
        _row("ffn_gate_exps.weight", "block_sparse_moe.experts.{expert}.w1.weight: ffn embd"),
        _row("ffn_up_exps.weight", "block_sparse_moe.experts.{expert}.w3.weight: ffn embd"),
        _row("ffn_down_exps.weight", "block_sparse_moe.experts.{expert}.w2.weight: embd ffn"),
    ),
    norm="layer",
    partial_rotary=None,
    # GGUF has no key for SparseMixer's threshold (router_jitter_noise); llama.cpp requires the biases.
    required_config={
        "router_jitter_noise": 0.01,
        "num_experts_per_tok": EXPERTS_USED,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    has_experts=True,
    has_biases=True,
    has_window=True,
    # short_mscale and long_mscale of Phi-3.5-MoE, which are equal. Converters that ignore them write the formula's
    # value instead.
    published_mscales={(4096, 131072): 1.243163121016122},
)

ARCHITECTURES = {row.name: row for row in (_PHI3, _LLAMA, _PHI2, _PHIMOE)}
