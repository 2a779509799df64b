"""What a GGUF file says about its model: sizes, rotary embedding, window, and the tensors it must hold.

Key names follow the GGUF specification. Defaults for keys that published files leave out are those of
llama.cpp's loader, so that a file means here what it means there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from phi_c._core import TENSOR_TYPES, dequantize
from phi_c.errors import ModelFileError, UnsupportedModelError
from phi_c.gguf.reader import GGUFFile, MetadataValue, short

RopeStyle: TypeAlias = Literal["neox", "interleaved"]
Norm: TypeAlias = Literal["rms", "layer"]
Activation: TypeAlias = Literal["swiglu", "gelu"]
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """What differs between the architectures that phi-c runs: one row per `general.architecture`."""

    name: str
    rope_style: RopeStyle  # neox: element i turns with i + rope_dims / 2; norm: 2 i turns with 2 i + 1
    fused_qkv: bool | None  # blk.N.attn_qkv holds the rows of q, k and v, in this order; None: as the file has it
    fused_gate_up: bool  # blk.N.ffn_up holds the rows of gate and up, in this order
    norm: Norm = "rms"  # layer: with the mean taken away, and a bias
    eps_key: str = "attention.layer_norm_rms_epsilon"
    activation: Activation = "swiglu"  # gelu: there is no gate
    parallel: bool = False  # attention and feed-forward read the same normed input: there is no ffn_norm
    experts: bool = False  # a router chooses EXPERTS_USED feed-forwards for each token
    biases: bool = False  # matrices of attention and the output may have biases, those of a gelu have


ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("phi3", "neox", fused_qkv=True, fused_gate_up=True),
        Architecture("llama", "interleaved", fused_qkv=False, fused_gate_up=False),
        Architecture(
            "phi2",
            "neox",
            fused_qkv=None,
            fused_gate_up=False,
            norm="layer",
            eps_key="attention.layer_norm_epsilon",
            activation="gelu",
            parallel=True,
            biases=True,
        ),
        # As transformers computes it, with LayerNorm and SparseMixer, whatever the name of its epsilon says.
        Architecture("phimoe", "neox", fused_qkv=False, fused_gate_up=False, norm="layer", experts=True, biases=True),
    )
}
EXPERTS_USED = 2  # what SparseMixer is made for


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its weights; every size is checked against the tensors in the file."""

    architecture: str
    name: str
    n_layers: int
    n_embd: int
    n_ffn: int
    n_heads: int
    n_kv_heads: int  # divides n_heads
    head_dim: int  # even
    rope_dims: int  # leading elements of a head that are rotated; even, at most head_dim
    n_vocab: int  # rows of the embedding: the tokenizer may name fewer
    n_ctx_train: int  # positions
    n_ctx_orig: int  # positions up to which LongRoPE's short factors hold
    long_rope: bool  # has factors of its own for longer sequences
    norm_eps: float
    rope_style: RopeStyle
    rope_freq_base: float
    rope_attn_factor: float  # multiplies cos and sin
    window: int | None  # sliding window of the attention in positions; None: attends to all
    rope_scale: float  # linear scaling: positions are divided by it
    fused_qkv: bool
    fused_gate_up: bool
    norm: Norm = "rms"
    activation: Activation = "swiglu"
    parallel: bool = False
    n_experts: int = 0  # 0: one feed-forward for all tokens
    attn_bias: bool = False  # q, k, v and the attention's output have biases
    output_bias: bool = False

    @property
    def ffn_bias(self) -> bool:
        """Whether up and down have biases: those of gelu have."""
        return self.activation == "gelu"


ROPE_LONG = "rope_factors_long.weight"
ROPE_SHORT = "rope_factors_short.weight"
ROPE_FREQS = "rope_freqs.weight"  # Llama 3's frequency divisors

# Types of one-dimensional tensors: those that dequantise element by element.
_VECTOR_TYPES = ("F32", "F16", "BF16")

# sliding_window in the published config.json of the models whose GGUF files leave it out, by
# (n_embd, n_ctx_train). The 128k models' windows (262144 and 131072) reach their whole context, and Phi-4
# and Phi-4-mini have none, so none of them has a row. llama.cpp's phi3 loader fills in the same numbers.
_PHI3_WINDOWS = {
    (3072, 4096): 2047,  # Phi-3-mini-4k
    (5120, 4096): 2047,  # Phi-3-medium-4k
}
# short_mscale and long_mscale, which are equal, in the published config.json of Phi-3.5-MoE, by
# (n_embd, n_ctx_train): converters that know no mscale write what the formula gives.
_PHIMOE_MSCALES = {(4096, 131072): 1.243163121016122}
# Files converted as `llama` are told by this as well, since other llamas share the sizes above.
_PHI3_N_VOCAB = 32064

# Keys that ask for arithmetic which phi-c does not do, and the value with which they ask for nothing.
_NEUTRAL_VALUES: dict[str, bool | float] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "use_parallel_residual": False,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "residual_scale": 1,
    "embedding_scale": 1,
    "swin_norm": False,
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.q_lora_rank": 0,
    "attention.kv_lora_rank": 0,
    "attention.temperature_length": 0,
    "attention.shared_kv_layers": 0,
}
_EXPERT_KEYS = ("expert_count", "expert_used_count")
# Keys that are refused whatever their value.
_REFUSED_KEYS = ("attention.scale", "attention.sliding_window_pattern", "rope.dimension_sections")

# Frequencies in float32 stay far from 0 and infinity while what scales them lies between these.
_FACTORS = (1e-6, 1e6)

_MAX_INT = 2**31 - 1  # positions and row numbers are 32-bit integers in the kernels


def read_config(file: GGUFFile) -> ModelConfig:
    """Return the configuration of the model in a GGUF file, after checking it against the file's tensors.

    One-dimensional tensors may be F32, F16 or BF16, matrices of any type that phi-c runs. Raises
    ModelFileError for values out of range and for missing or misshapen tensors, UnsupportedModelError for an
    architecture, a key or a tensor that phi-c does not run.
    """
    row = _architecture(file)
    _refuse_foreign_keys(file, row)
    n_vocab, n_embd = _embedding_shape(file)
    prefix = row.name + "."
    declared_embd = _integer(file, prefix + "embedding_length", n_embd)
    if declared_embd != n_embd:
        raise ModelFileError(
            f"{file.path}: {prefix}embedding_length is {declared_embd}, but token_embd.weight has {n_embd} columns"
        )
    n_heads = _integer(file, prefix + "attention.head_count")
    head_dim = _head_dim(file, prefix, n_embd, n_heads)
    n_ctx_train = _integer(file, prefix + "context_length")
    n_ctx_orig = _integer(file, prefix + "rope.scaling.original_context_length", n_ctx_train)
    config = ModelConfig(
        architecture=row.name,
        name=_text(file, "general.name", file.path.stem),
        n_layers=_integer(file, prefix + "block_count"),
        n_embd=n_embd,
        n_ffn=_integer(file, prefix + "feed_forward_length"),
        n_heads=n_heads,
        n_kv_heads=_integer(file, prefix + "attention.head_count_kv", n_heads),
        head_dim=head_dim,
        rope_dims=_integer(file, prefix + "rope.dimension_count", head_dim),
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        n_ctx_orig=n_ctx_orig,
        long_rope=ROPE_LONG in file.tensors,
        norm=row.norm,
        norm_eps=_number(file, prefix + row.eps_key, 1e-30, 1.0, default=1e-5),
        activation=row.activation,
        parallel=row.parallel,
        n_experts=_n_experts(file, prefix) if row.experts else 0,
        attn_bias=row.biases and "blk.0.attn_output.bias" in file.tensors,
        output_bias=row.biases and "output.bias" in file.tensors,
        rope_style=row.rope_style,
        rope_freq_base=_number(file, prefix + "rope.freq_base", 1.0, 1e15, default=10000.0),
        rope_attn_factor=_attn_factor(file, prefix, n_embd, n_ctx_train, n_ctx_orig),
        window=_window(file, prefix, n_embd, n_vocab, n_ctx_train),
        rope_scale=_rope_scale(file, prefix),
        fused_qkv="blk.0.attn_qkv.weight" in file.tensors if row.fused_qkv is None else row.fused_qkv,
        fused_gate_up=row.fused_gate_up,
    )
    _check_sizes(file, config)
    _check_tensors(file, config)
    return config


def expected_tensors(config: ModelConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return name -> shape (row-major) of the tensors that a file must hold, and of those it may hold."""
    n_embd, n_vocab = config.n_embd, config.n_vocab
    required: dict[str, Shape] = {"token_embd.weight": (n_vocab, n_embd), "output_norm.weight": (n_embd,)}
    if config.norm == "layer":
        required["output_norm.bias"] = (n_embd,)
    if config.output_bias:
        required["output.bias"] = (n_vocab,)
    block = _block_tensors(config)
    for layer in range(config.n_layers):
        required |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    frequencies = (config.rope_dims // 2,)
    optional: dict[str, Shape] = {
        "output.weight": (n_vocab, n_embd),  # absent: the embedding serves as output
        ROPE_LONG: frequencies,
        ROPE_SHORT: frequencies,
        ROPE_FREQS: frequencies,
    }
    return required, optional


def _block_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Return the tensors of a layer, without its prefix."""
    n_embd, n_ffn, n_experts = config.n_embd, config.n_ffn, config.n_experts
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if config.fused_qkv:
        attention: dict[str, Shape] = {"attn_qkv": (q_rows + 2 * kv_rows, n_embd)}
    else:
        attention = {"attn_q": (q_rows, n_embd), "attn_k": (kv_rows, n_embd), "attn_v": (kv_rows, n_embd)}
    attention["attn_output"] = (n_embd, q_rows)
    if n_experts:
        ffn: dict[str, Shape] = {
            "ffn_gate_inp": (n_experts, n_embd),
            "ffn_gate_exps": (n_experts, n_ffn, n_embd),
            "ffn_up_exps": (n_experts, n_ffn, n_embd),
            "ffn_down_exps": (n_experts, n_embd, n_ffn),
        }
    elif config.fused_gate_up:
        ffn = {"ffn_up": (2 * n_ffn, n_embd), "ffn_down": (n_embd, n_ffn)}
    elif config.activation == "gelu":
        ffn = {"ffn_up": (n_ffn, n_embd), "ffn_down": (n_embd, n_ffn)}
    else:
        ffn = {"ffn_gate": (n_ffn, n_embd), "ffn_up": (n_ffn, n_embd), "ffn_down": (n_embd, n_ffn)}
    tensors = {f"{name}.weight": shape for name, shape in (attention | ffn).items()}
    for has_bias, matrices in ((config.attn_bias, attention), (config.ffn_bias, ffn)):
        if has_bias:
            tensors |= {f"{name}.bias": (shape[0],) for name, shape in matrices.items()}
    for norm in ("attn_norm",) if config.parallel else ("attn_norm", "ffn_norm"):
        tensors[f"{norm}.weight"] = (n_embd,)
        if config.norm == "layer":
            tensors[f"{norm}.bias"] = (n_embd,)
    return tensors


def _architecture(file: GGUFFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        found = "no such key" if name is None else short(name)
        raise ModelFileError(f"{file.path}: general.architecture: expected a string, found {found}")
    row = ARCHITECTURES.get(name)
    if row is None:
        raise UnsupportedModelError(
            f"{file.path}: the architecture {short(name)} is not supported, expected one of {', '.join(ARCHITECTURES)}"
        )
    return row


def _refuse_foreign_keys(file: GGUFFile, row: Architecture) -> None:
    architecture = row.name
    for name, neutral in _NEUTRAL_VALUES.items():
        if (row.experts and name in _EXPERT_KEYS) or (row.parallel and name == "use_parallel_residual"):
            continue
        value = file.metadata.get(f"{architecture}.{name}", neutral)
        if not isinstance(value, bool | int | float) or value != neutral:
            raise UnsupportedModelError(
                f"{file.path}: {architecture}.{name} is {short(value)}, "
                f"and phi-c runs only models where it is {neutral} or absent"
            )
    for name in _REFUSED_KEYS:
        if f"{architecture}.{name}" in file.metadata:
            raise UnsupportedModelError(
                f"{file.path}: the metadata key {architecture}.{name} asks for a computation that phi-c does not do"
            )


def _embedding_shape(file: GGUFFile) -> tuple[int, int]:
    if not file.tensors:
        raise UnsupportedModelError(f"{file.path}: the file holds no tensors: a vocabulary, not a model")
    info = file.tensors.get("token_embd.weight")
    if info is None:
        raise ModelFileError(f"{file.path}: the file has no tensor 'token_embd.weight'")
    if len(info.shape) != 2:
        raise ModelFileError(f"{file.path}: token_embd.weight has the shape {info.shape}, expected (n_vocab, n_embd)")
    return info.shape[0], info.shape[1]


def _head_dim(file: GGUFFile, prefix: str, n_embd: int, n_heads: int) -> int:
    key = prefix + "attention.key_length"
    if key not in file.metadata and n_embd % n_heads:
        raise ModelFileError(
            f"{file.path}: {prefix}attention.head_count is {n_heads}, "
            f"expected a divisor of {n_embd} (n_embd) since {key} is absent"
        )
    head_dim = _integer(file, key, n_embd // n_heads)
    value_dim = _integer(file, prefix + "attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"{file.path}: {prefix}attention.value_length is {value_dim}, "
            f"and phi-c runs only models where it equals the key length, {head_dim}"
        )
    return head_dim


def _attn_factor(file: GGUFFile, prefix: str, n_embd: int, n_ctx_train: int, n_ctx_orig: int) -> float:
    """Return what LongRoPE multiplies cos and sin by: sqrt(1 + ln(s) / ln(orig)), s = context / orig.

    Formula: transformers, modeling_rope_utils (longrope); the file's own factor goes first.
    """
    key = prefix + "rope.scaling.attn_factor"
    if ROPE_LONG not in file.tensors or n_ctx_train <= n_ctx_orig or n_ctx_orig == 1:
        formula = 1.0
    else:
        formula = math.sqrt(1.0 + math.log(n_ctx_train / n_ctx_orig) / math.log(n_ctx_orig))
    factor = _number(file, key, *_FACTORS) if key in file.metadata else formula
    if prefix == "phimoe." and abs(factor - formula) < 1e-4:
        return _PHIMOE_MSCALES.get((n_embd, n_ctx_train), factor)
    return factor


def _n_experts(file: GGUFFile, prefix: str) -> int:
    used = _integer(file, prefix + "expert_used_count", EXPERTS_USED)
    if used != EXPERTS_USED:
        raise UnsupportedModelError(
            f"{file.path}: {prefix}expert_used_count is {used}, and phi-c runs only models of {EXPERTS_USED} a token"
        )
    return _integer(file, prefix + "expert_count", at_least=EXPERTS_USED)


def _rope_scale(file: GGUFFile, prefix: str) -> float:
    has_factors = ROPE_LONG in file.tensors and ROPE_SHORT in file.tensors
    kind = _text(file, prefix + "rope.scaling.type", "longrope" if has_factors else "linear")
    if kind == "linear":
        # scale_linear is the name that files of 2023 use; 0 stands for no scaling in both.
        for key in (prefix + "rope.scaling.factor", prefix + "rope.scale_linear"):
            value = file.metadata.get(key, 0)
            if not isinstance(value, int | float) or value != 0:
                return _number(file, key, *_FACTORS)
        return 1.0
    if kind == "longrope":
        if not has_factors:
            raise ModelFileError(
                f"{file.path}: {prefix}rope.scaling.type is longrope, but the file lacks {ROPE_LONG} or {ROPE_SHORT}"
            )
        return 1.0
    if kind == "none":
        return 1.0
    raise UnsupportedModelError(
        f"{file.path}: {prefix}rope.scaling.type is {short(kind)}, expected none, linear or longrope"
    )


def _window(file: GGUFFile, prefix: str, n_embd: int, n_vocab: int, n_ctx_train: int) -> int | None:
    key = prefix + "attention.sliding_window"
    if key in file.metadata:
        window = _integer(file, key, at_least=0)  # 0: what converters write for a model without a window
    elif prefix == "phi3." or n_vocab == _PHI3_N_VOCAB:
        window = _PHI3_WINDOWS.get((n_embd, n_ctx_train), 0)
    else:
        window = 0
    return window if 0 < window < n_ctx_train else None


def _check_sizes(file: GGUFFile, config: ModelConfig) -> None:
    checks = (
        (
            config.n_heads % config.n_kv_heads == 0,
            f"n_kv_heads is {config.n_kv_heads}",
            f"a divisor of {config.n_heads}",
        ),
        (config.head_dim % 2 == 0, f"head_dim is {config.head_dim}", "an even number"),
        (config.rope_dims % 2 == 0, f"rope.dimension_count is {config.rope_dims}", "an even number"),
        (
            config.rope_dims <= config.head_dim,
            f"rope.dimension_count is {config.rope_dims}",
            f"at most {config.head_dim} (head_dim)",
        ),
        # Before anything is made for each layer.
        (
            config.n_layers <= len(file.tensors),
            f"block_count is {config.n_layers}",
            f"at most the file's {len(file.tensors)} tensors",
        ),
    )
    for holds, found, expected in checks:
        if not holds:
            raise ModelFileError(f"{file.path}: {found}, expected {expected}")
    n_tokens = _n_tokens(file.metadata)
    if n_tokens > config.n_vocab:
        raise ModelFileError(
            f"{file.path}: the tokenizer has {n_tokens} tokens, but token_embd.weight has {config.n_vocab} rows"
        )


def _n_tokens(metadata: Mapping[str, MetadataValue]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else 0


def _check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    required, optional = expected_tensors(config)
    known = required | optional
    for name in file.tensors:
        if name not in known:
            raise UnsupportedModelError(
                f"{file.path}: tensor {short(name)} is not part of a {config.architecture} model of "
                f"{config.n_layers} layers as phi-c runs it; without it the output would be wrong"
            )
    for name in required:
        if name not in file.tensors:
            raise ModelFileError(f"{file.path}: the file has no tensor {name!r}")
    for name, info in file.tensors.items():
        if info.shape != known[name]:
            raise ModelFileError(f"{file.path}: tensor {name!r} has the shape {info.shape}, expected {known[name]}")
        if max(info.shape) > _MAX_INT:
            raise UnsupportedModelError(
                f"{file.path}: tensor {name!r} has the shape {info.shape}, expected at most {_MAX_INT} a side"
            )
        type_name = TENSOR_TYPES[info.type_id].name
        if len(info.shape) == 1 and type_name not in _VECTOR_TYPES:
            raise UnsupportedModelError(
                f"{file.path}: tensor {name!r} is of type {type_name}, expected one of {', '.join(_VECTOR_TYPES)}"
            )
    _check_rope_tensors(file, config)


def _check_rope_tensors(file: GGUFFile, config: ModelConfig) -> None:
    has_long, has_short = ROPE_LONG in file.tensors, ROPE_SHORT in file.tensors
    if has_long != has_short:
        there, missing = (ROPE_LONG, ROPE_SHORT) if has_long else (ROPE_SHORT, ROPE_LONG)
        raise ModelFileError(f"{file.path}: the file has a tensor {there!r} but no {missing!r}")
    if has_long and ROPE_FREQS in file.tensors:
        raise UnsupportedModelError(f"{file.path}: expected {ROPE_LONG} or {ROPE_FREQS}, found both")
    key = f"{config.architecture}.rope.scaling.original_context_length"
    if has_long and key not in file.metadata:
        # Guessing would choose the wrong factors in silence.
        raise ModelFileError(f"{file.path}: {key} is missing, expected with {ROPE_LONG}")
    low, high = _FACTORS
    for name in (ROPE_LONG, ROPE_SHORT, ROPE_FREQS):
        if name not in file.tensors:
            continue
        factors = dequantize(file.tensors[name].type_id, file.data(name), config.rope_dims // 2)
        outside = factors[~((factors >= low) & (factors <= high))]  # NaN is outside as well
        if outside.size:
            raise ModelFileError(
                f"{file.path}: tensor {name!r} holds {outside[0]}, expected numbers from {low:g} to {high:g}"
            )


def _integer(file: GGUFFile, key: str, default: int | None = None, *, at_least: int = 1) -> int:
    """Return an integer, or the one value of an array that gives the same for each layer."""
    value = file.metadata.get(key)
    if value is None:
        if default is None:
            raise ModelFileError(f"{file.path}: the metadata key {key} is missing")
        return default
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size > 0:
        if (value != value[0]).any():
            raise UnsupportedModelError(
                f"{file.path}: {key} differs between layers ({value.min()} to {value.max()}), expected one value"
            )
        value = int(value[0])
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= _MAX_INT:
        raise ModelFileError(f"{file.path}: {key} is {short(value)}, expected an integer from {at_least} to {_MAX_INT}")
    return value


def _number(file: GGUFFile, key: str, low: float, high: float, default: float | None = None) -> float:
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ModelFileError(f"{file.path}: {key} is {short(value)}, expected a number from {low:g} to {high:g}")
    return float(value)


def _text(file: GGUFFile, key: str, default: str) -> str:
    value = file.metadata.get(key, default)
    if not isinstance(value, str):
        raise ModelFileError(f"{file.path}: {key} is {short(value)}, expected a string")
    return value
