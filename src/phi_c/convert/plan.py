"""The plan of a conversion: the GGUF file's metadata, and the source tensors of each of its tensors."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phi_c.convert.hf_folder import HFFolder
from phi_c.convert.rope import Rope, read_rope
from phi_c.convert.safetensors_file import StoredTensor
from phi_c.convert.values import DTYPES
from phi_c.errors import ModelFileError, UnsupportedModelError
from phi_c.model.architectures import ARCHITECTURES, EXPERTS_USED, Architecture, TensorRow

_IGNORED_SUFFIX = ".rotary_emb.inv_freq"  # frequencies in old checkpoints: config.json determines them
_EXPERT = "{expert}"


@dataclass(frozen=True)
class Target:
    """A tensor of the GGUF file: either `parts`, concatenated by rows, or `values` computed from config.json."""

    name: str
    shape: tuple[int, ...]
    out_type: str  # F32, F16 or BF16
    parts: tuple[StoredTensor, ...] = ()
    paired_rows: int = 0  # rows of a head, which are permuted to interleaved pairs; 0: not permuted
    values: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """The content of the GGUF file, except for the tokenizer.

    metadata values are int (written as uint32), float (float32), bool or str.
    """

    architecture: Architecture
    n_vocab: int
    metadata: dict[str, Any]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes in config.json."""

    n_layers: int
    n_embd: int
    n_ffn: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    n_ctx: int
    n_experts: int
    is_tied: bool

    @property
    def dims(self) -> dict[str, int]:
        """The size that each word of a `TensorRow` shape stands for."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "embd": self.n_embd,
            "q": q,
            "kv": kv,
            "qkv": q + 2 * kv,
            "ffn": self.n_ffn,
            "2ffn": 2 * self.n_ffn,
            "vocab": self.n_vocab,
            "experts": self.n_experts,
        }


def make_plan(folder: HFFolder, out_type: str | None) -> ConversionPlan:
    """Return what to write for a folder.

    out_type: type of the matrices, F32, F16 or BF16; None: as stored.

    Raises UnsupportedModelError for a model that no row of `ARCHITECTURES` describes or for a tensor that its row does
    not name, ModelFileError for a missing or misshapen tensor.
    """
    architecture = _architecture(folder)
    sizes = _sizes(folder, architecture)
    config_path = str(folder.path / "config.json")
    rope = read_rope(folder.config, sizes.head_dim, sizes.n_ctx, architecture.partial_rotary, config_path)
    if rope.kind not in architecture.rope_kinds:
        raise _unsupported(folder, "rope_type", rope.kind, architecture.rope_kinds)
    used: set[str] = set()
    model_rows = [row for row in architecture.model_tensors if not (row.untied_only and sizes.is_tied)]
    targets = [_target(folder, row, sizes, None, out_type, used) for row in model_rows]
    for layer in range(sizes.n_layers):
        targets += [_target(folder, row, sizes, layer, out_type, used) for row in architecture.layer_tensors]
    targets += [Target(name, values.shape, "F32", values=values) for name, values in rope.tensors.items()]
    _refuse_unused(folder, used, sizes)
    metadata = _metadata(folder, architecture, sizes, rope, targets)
    return ConversionPlan(architecture, sizes.n_vocab, metadata, tuple(targets))


def _architecture(folder: HFFolder) -> Architecture:
    names = folder.config.get("architectures")
    known = {name: row for row in ARCHITECTURES.values() for name in row.transformers_classes}
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        raise _unsupported(folder, "architectures", names, tuple(known))
    if folder.config.get("quantization_config"):
        raise UnsupportedModelError(f"{folder.path}: the weights are quantised, expected float weights")
    architecture = known[names[0]]
    for key, required in architecture.required_config.items():
        if folder.config.get(key, required) != required:
            raise _unsupported(folder, key, folder.config[key], (required,))
    activation = folder.config.get("hidden_act", architecture.hidden_acts[0])
    if activation not in architecture.hidden_acts:
        raise _unsupported(folder, "hidden_act", activation, architecture.hidden_acts)
    return architecture


def _sizes(folder: HFFolder, architecture: Architecture) -> Sizes:
    def integer(key: str, default: int | None = None) -> int:
        value = folder.config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise ModelFileError(f"{folder.path / 'config.json'}: {key} is {value!r:.60}, expected a positive integer")
        return value

    n_embd, n_heads = integer("hidden_size"), integer("num_attention_heads")
    return Sizes(
        n_layers=integer("num_hidden_layers"),
        n_embd=n_embd,
        n_ffn=integer("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=integer("num_key_value_heads", n_heads),
        head_dim=integer("head_dim", max(n_embd // n_heads, 1)),
        n_vocab=integer("vocab_size"),
        n_ctx=integer("max_position_embeddings"),
        n_experts=integer("num_local_experts") if architecture.has_experts else 0,
        is_tied=bool(folder.config.get("tie_word_embeddings", False)),
    )


def _target(
    folder: HFFolder, row: TensorRow, sizes: Sizes, layer: int | None, out_type: str | None, used: set[str]
) -> Target:
    """Return the target of a row, and add the names of its sources to `used`; layer: None for the model's rows."""
    source_prefix, target_prefix = ("", "") if layer is None else (f"model.layers.{layer}.", f"blk.{layer}.")
    is_stacked = _EXPERT in row.sources[0][0]
    parts = []
    for source, words in row.sources:
        shape = tuple(sizes.dims[word] for word in words.split())
        for expert in range(sizes.n_experts if is_stacked else 1):
            name = source_prefix + source.replace(_EXPERT, str(expert))
            parts.append(_stored(folder, name, shape))
            used.add(name)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if is_stacked:
        shape = (len(parts), *parts[0].shape)
    is_f32 = row.always_f32 or len(shape) == 1
    return Target(
        target_prefix + row.name,
        shape,
        "F32" if is_f32 else out_type or parts[0].dtype,
        tuple(parts),
        paired_rows=sizes.head_dim if row.interleaved else 0,
    )


def _stored(folder: HFFolder, name: str, shape: tuple[int, ...]) -> StoredTensor:
    tensor = folder.tensors.get(name)
    if tensor is None:
        raise ModelFileError(f"{folder.path} has no tensor {name!r}")
    if tensor.dtype not in DTYPES:
        raise UnsupportedModelError(f"{tensor.path}: {name!r} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    if tensor.shape != shape:
        raise ModelFileError(
            f"{tensor.path}: {name!r} has the shape {tensor.shape}, expected {shape} according to config.json"
        )
    return tensor


def _refuse_unused(folder: HFFolder, used: set[str], sizes: Sizes) -> None:
    for name in sorted(folder.tensors.keys() - used):
        # If config.json ties the embedding, transformers ignores a stored lm_head as well.
        is_tied_copy = name == "lm_head.weight" and sizes.is_tied
        if not is_tied_copy and not name.endswith(_IGNORED_SUFFIX):
            raise UnsupportedModelError(
                f"{folder.path}: tensor {name!r} has no GGUF counterpart, and ignoring it would give wrong output"
            )


def _metadata(
    folder: HFFolder, architecture: Architecture, sizes: Sizes, rope: Rope, targets: list[Target]
) -> dict[str, Any]:
    config = folder.config
    path = folder.path / "config.json"
    eps = next((config[key] for key in architecture.config_eps_keys if key in config), 1e-5)
    window = config.get("sliding_window") or 0
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise ModelFileError(f"{path}: {architecture.config_eps_keys[0]} is {eps!r:.60}, expected a number from 0 to 1")
    if type(window) is not int or not 0 <= window < 2**31:
        raise ModelFileError(f"{path}: sliding_window is {window!r:.60}, expected a number of positions or null")
    values: dict[str, Any] = {
        "vocab_size": sizes.n_vocab,
        "context_length": sizes.n_ctx,
        "embedding_length": sizes.n_embd,
        "block_count": sizes.n_layers,
        "feed_forward_length": sizes.n_ffn,
        "attention.head_count": sizes.n_heads,
        "attention.head_count_kv": sizes.n_kv_heads,
        architecture.eps_key: float(eps),
        "rope.dimension_count": rope.dims,
        "rope.freq_base": rope.base,
    }
    if sizes.head_dim * sizes.n_heads != sizes.n_embd:
        values |= {"attention.key_length": sizes.head_dim, "attention.value_length": sizes.head_dim}
    if architecture.has_window:
        # 0 distinguishes a model without a window from a file written before the key existed.
        values["attention.sliding_window"] = window
        values["rope.scaling.original_context_length"] = rope.n_ctx_orig or sizes.n_ctx
    if rope.kind == "longrope":
        values["rope.scaling.attn_factor"] = rope.attn_factor
    if rope.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    if architecture.has_experts:
        values |= {"expert_count": sizes.n_experts, "expert_used_count": EXPERTS_USED}
    general = {"general.name": folder.path.resolve().name, "general.file_type": _file_type(targets)}
    return general | {f"{architecture.name}.{key}": value for key, value in values.items()}


def _file_type(targets: list[Target]) -> int:
    """Return llama.cpp's `general.file_type`: the number for the type of most matrices."""
    return {"F32": 0, "F16": 1, "BF16": 32}[targets[0].out_type]


def _unsupported(folder: HFFolder, key: str, found: Any, supported: tuple[Any, ...]) -> UnsupportedModelError:
    expected = ("one of " if len(supported) > 1 else "") + ", ".join(map(str, supported))
    return UnsupportedModelError(f"{folder.path / 'config.json'}: {key} is {found!r:.80}, expected {expected}")
