"""What a GGUF file will hold: its metadata, and for each tensor the stored tensors that it is made of."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phi_c.convert.architectures import ARCHITECTURES, Architecture, Row
from phi_c.convert.hf_folder import HFFolder
from phi_c.convert.rope import Rope, read_rope
from phi_c.convert.safetensors_file import StoredTensor
from phi_c.convert.values import DTYPES
from phi_c.errors import ModelFileError, UnsupportedModelError

# Old checkpoints keep the frequencies, which follow from config.json.
_COMPUTED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Target:
    """A tensor of the GGUF file: `parts` joined by rows, or `values` computed from config.json."""

    name: str
    shape: tuple[int, ...]
    out_type: str  # F32, F16 or BF16
    parts: tuple[StoredTensor, ...] = ()
    paired_rows: int = 0  # rows of a head, if they are to be interleaved
    values: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Plan:
    """metadata: keys without tokenizer's, values of the type that GGUF wants: int, float (float32), bool or str."""

    architecture: Architecture
    n_vocab: int
    metadata: dict[str, Any]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Sizes:
    """Numbers in config.json, and the words that rows use for them."""

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
        """Return the size that each word of a row's shape stands for."""
        q, k = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "embd": self.n_embd,
            "q": q,
            "k": k,
            "qkv": q + 2 * k,
            "ffn": self.n_ffn,
            "2ffn": 2 * self.n_ffn,
            "vocab": self.n_vocab,
            "experts": self.n_experts,
        }


def make_plan(folder: HFFolder, out_type: str | None) -> Plan:
    """Return what to write; out_type: F32, F16 or BF16 of the matrices, None: as they are stored.

    Raises UnsupportedModelError for a model that the tables do not describe or a tensor that they do not name,
    ModelFileError for a missing or misshapen one.
    """
    architecture = _architecture(folder)
    sizes = _sizes(folder, architecture)
    partial = architecture.partial_rotary
    rope = read_rope(folder.config, sizes.head_dim, sizes.n_ctx, partial, str(folder.path / "config.json"))
    if rope.kind not in architecture.rope_kinds:
        raise _unsupported(folder, "the rotary scaling", rope.kind, architecture.rope_kinds)
    used: set[str] = set()
    targets = [_target(folder, row, sizes, None, out_type, used) for row in _rows(architecture.model, sizes)]
    for layer in range(sizes.n_layers):
        targets += [_target(folder, row, sizes, layer, out_type, used) for row in _rows(architecture.layer, sizes)]
    targets += [Target(name, values.shape, "F32", values=values) for name, values in rope.tensors.items()]
    _refuse_unused(folder, used, sizes)
    return Plan(architecture, sizes.n_vocab, _metadata(folder, architecture, sizes, rope, targets), tuple(targets))


def _architecture(folder: HFFolder) -> Architecture:
    names = folder.config.get("architectures")
    known = {name: row for row in ARCHITECTURES for name in row.classes}
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        raise _unsupported(folder, "architectures", names, tuple(known))
    if folder.config.get("quantization_config"):
        raise UnsupportedModelError(f"{folder.path}: the weights are quantised, expected float weights")
    architecture = known[names[0]]
    for key, wanted in architecture.required.items():
        if folder.config.get(key, wanted) != wanted:
            raise _unsupported(folder, key, folder.config[key], (wanted,))
    activation = folder.config.get("hidden_act", architecture.activations[0])
    if activation not in architecture.activations:
        raise _unsupported(folder, "hidden_act", activation, architecture.activations)
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
        n_experts=integer("num_local_experts") if architecture.is_moe else 0,
        is_tied=bool(folder.config.get("tie_word_embeddings", False)),
    )


def _rows(rows: tuple[Row, ...], sizes: Sizes) -> list[Row]:
    return [row for row in rows if not (row.untied and sizes.is_tied)]


def _target(
    folder: HFFolder, row: Row, sizes: Sizes, layer: int | None, out_type: str | None, used: set[str]
) -> Target:
    above, below = ("", "") if layer is None else (f"model.layers.{layer}.", f"blk.{layer}.")
    stacked = "{x}" in row.sources[0][0]
    parts = []
    for name, words in row.sources:
        shape = tuple(sizes.dims[word] for word in words.split())
        for full in [above + name.format(x=x) for x in range(sizes.n_experts)] if stacked else [above + name]:
            parts.append(_stored(folder, full, shape))
            used.add(full)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if stacked:
        shape = (len(parts), *parts[0].shape)
    kept = row.f32 or len(shape) == 1
    return Target(
        below + row.target,
        shape,
        "F32" if kept else out_type or parts[0].dtype,
        tuple(parts),
        paired_rows=sizes.head_dim if row.paired else 0,
    )


def _stored(folder: HFFolder, name: str, shape: tuple[int, ...]) -> StoredTensor:
    tensor = folder.tensors.get(name)
    if tensor is None:
        raise ModelFileError(f"{folder.path} has no tensor {name!r}")
    if tensor.dtype not in DTYPES:
        raise UnsupportedModelError(f"{tensor.path}: {name!r} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    if tensor.shape != shape:
        raise ModelFileError(f"{tensor.path}: {name!r} has the shape {tensor.shape}, expected {shape} by config.json")
    return tensor


def _refuse_unused(folder: HFFolder, used: set[str], sizes: Sizes) -> None:
    for name in sorted(folder.tensors.keys() - used):
        # transformers, too, takes the embedding when config.json ties them, whatever is stored.
        is_tied_copy = name == "lm_head.weight" and sizes.is_tied
        if not is_tied_copy and not name.endswith(_COMPUTED):
            raise UnsupportedModelError(
                f"{folder.path}: tensor {name!r} has no place in the GGUF file; without it the output would be wrong"
            )


def _metadata(
    folder: HFFolder, architecture: Architecture, sizes: Sizes, rope: Rope, targets: list[Target]
) -> dict[str, Any]:
    config = folder.config
    where = folder.path / "config.json"
    eps = next((config[key] for key in architecture.norm_configs if key in config), 1e-5)
    window = config.get("sliding_window") or 0
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise ModelFileError(f"{where}: {architecture.norm_configs[0]} is {eps!r:.60}, expected a number from 0 to 1")
    if type(window) is not int or not 0 <= window < 2**31:
        raise ModelFileError(f"{where}: sliding_window is {window!r:.60}, expected a number of positions or null")
    values: dict[str, Any] = {
        "vocab_size": sizes.n_vocab,
        "context_length": sizes.n_ctx,
        "embedding_length": sizes.n_embd,
        "block_count": sizes.n_layers,
        "feed_forward_length": sizes.n_ffn,
        "attention.head_count": sizes.n_heads,
        "attention.head_count_kv": sizes.n_kv_heads,
        architecture.norm_key: float(eps),
        "rope.dimension_count": rope.dims,
        "rope.freq_base": rope.base,
    }
    if sizes.head_dim * sizes.n_heads != sizes.n_embd:
        values |= {"attention.key_length": sizes.head_dim, "attention.value_length": sizes.head_dim}
    if architecture.has_window:
        # 0 tells a model without a window from one whose file was made before the key existed.
        values["attention.sliding_window"] = window
        values["rope.scaling.original_context_length"] = rope.n_ctx_orig or sizes.n_ctx
    if rope.kind == "longrope":
        values["rope.scaling.attn_factor"] = rope.attn_factor
    if rope.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    if architecture.is_moe:
        values |= {"expert_count": sizes.n_experts, "expert_used_count": int(config.get("num_experts_per_tok", 2))}
    general = {"general.name": folder.path.resolve().name, "general.file_type": _file_type(targets)}
    return general | {f"{architecture.name}.{key}": value for key, value in values.items()}


def _file_type(targets: list[Target]) -> int:
    """Return llama.cpp's number for the type of most matrices."""
    return {"F32": 0, "F16": 1, "BF16": 32}[targets[0].out_type]


def _unsupported(folder: HFFolder, what: str, found: Any, known: tuple[Any, ...]) -> UnsupportedModelError:
    expected = ("one of " if len(known) > 1 else "") + ", ".join(map(str, known))
    return UnsupportedModelError(f"{folder.path / 'config.json'}: {what} is {found!r:.80}, expected {expected}")
