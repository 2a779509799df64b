"""The model configuration in a GGUF file: sizes, rotary embedding, sliding window, and the tensors it must contain.

Key names follow the GGUF specification. Defaults for keys that published files omit are those of llama.cpp's loader,
so that both run a file in the same way.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

from phi_c._core import TENSOR_TYPES, dequantize
from phi_c.errors import ModelFileError, UnsupportedModelError
from phi_c.gguf.reader import GGUFFile, short
from phi_c.model.architectures import EXPERTS_USED, Activation, Architecture, NormKind, RopeStyle
from phi_c.model.metadata import (
    MAX_INT,
    read_architecture,
    read_integer,
    read_number,
    read_string,
    refuse_unsupported_keys,
)

Shape: TypeAlias = tuple[int, ...]

ROPE_LONG = "rope_factors_long.weight"
ROPE_SHORT = "rope_factors_short.weight"
ROPE_FREQS = "rope_freqs.weight"  # Llama 3's frequency divisors

# Types of one-dimensional tensors: those without blocks.
_VECTOR_TYPES = ("F32", "F16", "BF16")

# Range of the factors that scale RoPE frequencies: within it, float32 frequencies neither vanish nor overflow.
_MIN_FACTOR, _MAX_FACTOR = 1e-6, 1e6


@dataclass(frozen=True)
class ModelConfig:
    """A model without its weights; `read_config` checks every size against the tensors in the file."""

    architecture: str  # general.architecture
    name: str
    n_layers: int
    n_embd: int
    n_ffn: int
    n_heads: int
    n_kv_heads: int  # divides n_heads
    head_dim: int  # even
    rope_dims: int  # leading elements of a head that are rotated; even, at most head_dim
    n_vocab: int  # rows of the embedding; the tokenizer may have fewer tokens
    n_ctx_train: int  # longest context of the model, positions
    n_ctx_orig: int  # original context, positions: up to it LongRoPE uses the short factors
    long_rope: bool  # the file has LongRoPE factors
    norm_eps: float
    rope_style: RopeStyle
    rope_freq_base: float
    rope_attn_factor: float  # multiplies cos and sin
    window: int | None  # sliding window of attention, positions; None: full attention
    rope_scale: float  # linear scaling: positions are divided by it
    fused_qkv: bool  # attn_qkv holds the rows of q, k and v
    fused_gate_up: bool  # ffn_up holds the rows of gate and up
    norm: NormKind = "rms"
    activation: Activation = "swiglu"
    parallel: bool = False  # attention and feed-forward read the same normed input
    n_experts: int = 0  # 0: one feed-forward for all tokens
    attn_bias: bool = False  # q, k, v and the attention output have biases
    output_bias: bool = False

    @property
    def ffn_bias(self) -> bool:
        """Whether up and down have biases, as they do with gelu."""
        return self.activation == "gelu"


def read_config(file: GGUFFile) -> ModelConfig:
    """Return the model configuration of a GGUF file, after checking it against the file's tensors.

    One-dimensional tensors may be F32, F16 or BF16, matrices of any type that phi-c runs.

    Raises ModelFileError for values out of range and for missing or misshapen tensors, UnsupportedModelError for an
    architecture, a key or a tensor that phi-c does not run.
    """
    row = read_architecture(file)
    refuse_unsupported_keys(file, row)
    n_vocab, n_embd = _embedding_shape(file)
    prefix = row.name + "."
    declared_embd = read_integer(file, prefix + "embedding_length", n_embd)
    if declared_embd != n_embd:
        raise ModelFileError(
            f"{file.path}: {prefix}embedding_length is {declared_embd}, but token_embd.weight has {n_embd} columns"
        )
    n_heads = read_integer(file, prefix + "attention.head_count")
    head_dim = _head_dim(file, prefix, n_embd, n_heads)
    n_ctx_train = read_integer(file, prefix + "context_length")
    n_ctx_orig = read_integer(file, prefix + "rope.scaling.original_context_length", n_ctx_train)
    config = ModelConfig(
        architecture=row.name,
        name=read_string(file, "general.name", file.path.stem),
        n_layers=read_integer(file, prefix + "block_count"),
        n_embd=n_embd,
        n_ffn=read_integer(file, prefix + "feed_forward_length"),
        n_heads=n_heads,
        n_kv_heads=read_integer(file, prefix + "attention.head_count_kv", n_heads),
        head_dim=head_dim,
        rope_dims=read_integer(file, prefix + "rope.dimension_count", head_dim),
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        n_ctx_orig=n_ctx_orig,
        long_rope=ROPE_LONG in file.tensors,
        norm=row.norm,
        norm_eps=read_number(file, prefix + row.eps_key, 1e-30, 1.0, default=1e-5),
        activation=row.activation,
        parallel=row.is_parallel,
        n_experts=_n_experts(file, prefix) if row.has_experts else 0,
        attn_bias=row.has_biases and "blk.0.attn_output.bias" in file.tensors,
        output_bias=row.has_biases and "output.bias" in file.tensors,
        rope_style=row.rope_style,
        rope_freq_base=read_number(file, prefix + "rope.freq_base", 1.0, 1e15, default=10000.0),
        rope_attn_factor=_attn_factor(file, row, n_embd, n_ctx_train, n_ctx_orig),
        window=_window(file, row, n_embd, n_vocab, n_ctx_train),
        rope_scale=_rope_scale(file, prefix),
        fused_qkv="blk.0.attn_qkv.weight" in file.tensors if row.fused_qkv is None else row.fused_qkv,
        fused_gate_up=row.fused_gate_up,
    )
    _check_sizes(file, config)
    _check_tensors(file, config)
    return config


def expected_tensors(config: ModelConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return name -> row-major shape of the tensors that a file must contain, and of those that it may contain."""
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
        "output.weight": (n_vocab, n_embd),  # absent: tied to the embedding
        ROPE_LONG: frequencies,
        ROPE_SHORT: frequencies,
        ROPE_FREQS: frequencies,
    }
    return required, optional


def _block_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Return name -> shape of the tensors of one layer, names without `blk.N.`."""
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


def _embedding_shape(file: GGUFFile) -> tuple[int, int]:
    """Return (n_vocab, n_embd)."""
    if not file.tensors:
        raise UnsupportedModelError(f"{file.path}: the file has no tensors: it is a vocabulary, expected a model")
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
    head_dim = read_integer(file, key, n_embd // n_heads)
    value_dim = read_integer(file, prefix + "attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"{file.path}: {prefix}attention.value_length is {value_dim}, expected {head_dim}: "
            "phi-c runs only models whose key and value lengths are equal"
        )
    return head_dim


def _attn_factor(file: GGUFFile, row: Architecture, n_embd: int, n_ctx_train: int, n_ctx_orig: int) -> float:
    """Return LongRoPE's attention factor, which multiplies cos and sin.

    The file's own factor, or sqrt(1 + ln(n_ctx_train / n_ctx_orig) / ln(n_ctx_orig)), as in transformers'
    modeling_rope_utils (longrope).
    """
    key = f"{row.name}.rope.scaling.attn_factor"
    if ROPE_LONG not in file.tensors or n_ctx_train <= n_ctx_orig or n_ctx_orig == 1:
        formula = 1.0
    else:
        formula = math.sqrt(1.0 + math.log(n_ctx_train / n_ctx_orig) / math.log(n_ctx_orig))
    factor = read_number(file, key, _MIN_FACTOR, _MAX_FACTOR) if key in file.metadata else formula
    if abs(factor - formula) < 1e-4:
        return row.published_mscales.get((n_embd, n_ctx_train), factor)
    return factor


def _n_experts(file: GGUFFile, prefix: str) -> int:
    used = read_integer(file, prefix + "expert_used_count", EXPERTS_USED)
    if used != EXPERTS_USED:
        raise UnsupportedModelError(
            f"{file.path}: {prefix}expert_used_count is {used}, expected {EXPERTS_USED}: "
            f"phi-c runs only models with {EXPERTS_USED} experts per token"
        )
    return read_integer(file, prefix + "expert_count", at_least=EXPERTS_USED)


def _rope_scale(file: GGUFFile, prefix: str) -> float:
    has_factors = ROPE_LONG in file.tensors and ROPE_SHORT in file.tensors
    kind = read_string(file, prefix + "rope.scaling.type", "longrope" if has_factors else "linear")
    if kind == "linear":
        # Files of 2023 use the key scale_linear. In both, 0 means no scaling.
        for key in (prefix + "rope.scaling.factor", prefix + "rope.scale_linear"):
            value = file.metadata.get(key, 0)
            if not isinstance(value, int | float) or value != 0:
                return read_number(file, key, _MIN_FACTOR, _MAX_FACTOR)
        return 1.0
    if kind == "longrope":
        if not has_factors:
            raise ModelFileError(
                f"{file.path}: {prefix}rope.scaling.type is longrope, but {ROPE_LONG} or {ROPE_SHORT} is missing"
            )
        return 1.0
    if kind == "none":
        return 1.0
    raise UnsupportedModelError(
        f"{file.path}: {prefix}rope.scaling.type is {short(kind)}, expected none, linear or longrope"
    )


def _window(file: GGUFFile, row: Architecture, n_embd: int, n_vocab: int, n_ctx_train: int) -> int | None:
    key = f"{row.name}.attention.sliding_window"
    if key in file.metadata:
        window = read_integer(file, key, at_least=0)  # converters write 0 for a model without a window
    elif row.published_windows_n_vocab in (None, n_vocab):
        window = row.published_windows.get((n_embd, n_ctx_train), 0)
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
        # Checked before anything is allocated per layer.
        (
            config.n_layers <= len(file.tensors),
            f"block_count is {config.n_layers}",
            f"at most the file's {len(file.tensors)} tensors",
        ),
    )
    for is_valid, found, expected in checks:
        if not is_valid:
            raise ModelFileError(f"{file.path}: {found}, expected {expected}")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, list) else 0
    if n_tokens > config.n_vocab:
        raise ModelFileError(
            f"{file.path}: the tokenizer has {n_tokens} tokens, but token_embd.weight has {config.n_vocab} rows"
        )


def _check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    required, optional = expected_tensors(config)
    known = required | optional
    for name in file.tensors:
        if name not in known:
            raise UnsupportedModelError(
                f"{file.path}: tensor {short(name)} is not part of a {config.architecture} model with "
                f"{config.n_layers} layers, and ignoring it would give wrong output"
            )
    for name in required:
        if name not in file.tensors:
            raise ModelFileError(f"{file.path}: the file has no tensor {name!r}")
    for name, info in file.tensors.items():
        if info.shape != known[name]:
            raise ModelFileError(f"{file.path}: tensor {name!r} has the shape {info.shape}, expected {known[name]}")
        if max(info.shape) > MAX_INT:
            raise UnsupportedModelError(
                f"{file.path}: tensor {name!r} has the shape {info.shape}, expected at most {MAX_INT} per dimension"
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
        present, missing = (ROPE_LONG, ROPE_SHORT) if has_long else (ROPE_SHORT, ROPE_LONG)
        raise ModelFileError(f"{file.path}: the file has the tensor {present!r} but not {missing!r}")
    if has_long and ROPE_FREQS in file.tensors:
        raise UnsupportedModelError(f"{file.path}: expected {ROPE_LONG} or {ROPE_FREQS}, found both")
    key = f"{config.architecture}.rope.scaling.original_context_length"
    if has_long and key not in file.metadata:
        # A default would silently choose the wrong factors.
        raise ModelFileError(f"{file.path}: {key} is missing, but {ROPE_LONG} requires it")
    for name in (ROPE_LONG, ROPE_SHORT, ROPE_FREQS):
        if name not in file.tensors:
            continue
        factors = dequantize(file.tensors[name].type_id, file.data(name), config.rope_dims // 2)
        outside = factors[~((factors >= _MIN_FACTOR) & (factors <= _MAX_FACTOR))]  # catches NaN too
        if outside.size:
            raise ModelFileError(
                f"{file.path}: tensor {name!r} contains {outside[0]}, "
                f"expected values from {_MIN_FACTOR:g} to {_MAX_FACTOR:g}"
            )
