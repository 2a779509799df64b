"""The type mixes of llama.cpp: which type each tensor of a quantised file gets.

A file type such as Q4_K_M has a default type and rules that give more sensitive tensors a type with more bits. The
rules are those of llama.cpp's src/llama-quant.cpp at the time the published Phi files were made, where the fused
`attn_qkv` has its own rules. Releases of 2026 apply the rules of `attn_v` to it, which gives most of it fewer bits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from phi_c.errors import OptionError
from phi_c.gguf.reader import MetadataValue
from phi_c.gguf.types import TENSOR_TYPES_BY_NAME

FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class FileType:
    """A row of FILE_TYPES."""

    name: str
    number: int  # value of general.file_type
    default: str  # type of the tensors that no rule matches


FILE_TYPES = {
    row.name: row
    for row in (
        FileType("F32", 0, "F32"),
        FileType("F16", 1, "F16"),
        FileType("BF16", 32, "BF16"),
        FileType("Q8_0", 7, "Q8_0"),
        FileType("Q6_K", 18, "Q6_K"),
        FileType("Q5_K_M", 17, "Q5_K"),
        FileType("Q5_K_S", 16, "Q5_K"),
        FileType("Q5_1", 9, "Q5_1"),
        FileType("Q5_0", 8, "Q5_0"),
        FileType("Q4_K_M", 15, "Q4_K"),
        FileType("Q4_K_S", 14, "Q4_K"),
        FileType("Q4_1", 3, "Q4_1"),
        FileType("Q4_0", 2, "Q4_0"),
        FileType("Q3_K_L", 13, "Q3_K"),
        FileType("Q3_K_M", 12, "Q3_K"),
        FileType("Q3_K_S", 11, "Q3_K"),
        FileType("Q2_K", 10, "Q2_K"),
    )
}


@dataclass(frozen=True)
class Model:
    """The properties of a model that the rules depend on."""

    n_layers: int
    n_gqa: int = 1  # query heads per key/value head
    n_experts: int = 0
    is_tied: bool = False  # the embedding is also the output matrix
    has_imatrix: bool = False  # an importance matrix is used
    is_llama_70b: bool = False


def read_model(metadata: Mapping[str, MetadataValue], names: Sequence[str], *, has_imatrix: bool) -> Model:
    """Return the properties of a model from its metadata and the names of its tensors."""
    architecture = metadata.get("general.architecture", "")

    def size(key: str, default: int) -> int:
        value = metadata.get(f"{architecture}.{key}", default)
        return value if isinstance(value, int) and value > 0 else default

    layers = [layer for name in names if (layer := _layer(name)) is not None]
    n_layers = size("block_count", max(layers, default=-1) + 1)
    n_heads = size("attention.head_count", 1)
    n_kv_heads = size("attention.head_count_kv", n_heads)
    return Model(
        n_layers=n_layers,
        n_gqa=n_heads // n_kv_heads,
        n_experts=size("expert_count", 0),
        is_tied="output.weight" not in names,
        has_imatrix=has_imatrix,
        is_llama_70b=architecture == "llama" and n_layers == 80 and n_heads != n_kv_heads,
    )


Condition = Callable[[Model, int], bool]


def _always(model: Model, layer: int) -> bool:
    return True


def _use_more_bits(model: Model, layer: int) -> bool:
    """llama.cpp's use_more_bits: the first eighth, the last eighth, and every third layer in between."""
    eighth = model.n_layers // 8
    return layer < eighth or layer >= 7 * model.n_layers // 8 or (layer - eighth) % 3 == 2


def _first_eighth(model: Model, layer: int) -> bool:
    return layer < model.n_layers // 8


def _first_sixteenth(model: Model, layer: int) -> bool:
    return layer < model.n_layers // 16


def _first_two(model: Model, layer: int) -> bool:
    return layer < 2


def _first_four(model: Model, layer: int) -> bool:
    return layer < 4


def _has_gqa_of_4(model: Model, layer: int) -> bool:
    return model.n_gqa >= 4


def _first_eighth_with_imatrix(model: Model, layer: int) -> bool:
    return model.has_imatrix and _first_eighth(model, layer)


def _has_8_experts(model: Model, layer: int) -> bool:
    return model.n_experts == 8


def _is_llama_70b(model: Model, layer: int) -> bool:
    return model.is_llama_70b


_FOUR_BITS_OR_LESS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")

# Part of the tensor's name, file types, condition, type. The first matching rule applies.
_RULES: tuple[tuple[str, tuple[str, ...], Condition, str], ...] = (
    ("attn_v.weight", tuple(FILE_TYPES), _has_8_experts, "Q8_0"),
    ("attn_k.weight", tuple(FILE_TYPES), _has_8_experts, "Q8_0"),
    ("attn_v.weight", ("Q4_K_M", "Q5_K_M"), _use_more_bits, "Q6_K"),
    ("attn_v.weight", ("Q4_K_S",), _first_four, "Q5_K"),
    ("attn_v.weight", ("Q3_K_L",), _always, "Q5_K"),
    ("attn_v.weight", ("Q3_K_M",), _first_two, "Q5_K"),
    ("attn_v.weight", _FOUR_BITS_OR_LESS, _is_llama_70b, "Q5_K"),
    ("attn_v.weight", ("Q3_K_M",), _always, "Q4_K"),
    ("attn_v.weight", ("Q2_K",), _has_gqa_of_4, "Q4_K"),
    ("attn_v.weight", ("Q2_K",), _always, "Q3_K"),
    ("attn_qkv.weight", ("Q5_K_M",), _always, "Q6_K"),
    ("attn_qkv.weight", ("Q4_K_M",), _always, "Q5_K"),
    ("attn_qkv.weight", ("Q3_K_L", "Q3_K_M"), _always, "Q4_K"),
    ("attn_output.weight", _FOUR_BITS_OR_LESS, _has_8_experts, "Q5_K"),
    ("attn_output.weight", ("Q3_K_L",), lambda model, layer: model.n_experts != 8, "Q5_K"),
    ("attn_output.weight", ("Q3_K_M",), _always, "Q4_K"),
    ("attn_output.weight", ("Q2_K",), _always, "Q3_K"),
    ("ffn_down", ("Q4_K_M", "Q5_K_M"), _use_more_bits, "Q6_K"),
    ("ffn_down", ("Q4_K_S",), _first_eighth, "Q5_K"),
    ("ffn_down", ("Q3_K_L",), _always, "Q5_K"),
    ("ffn_down", ("Q3_K_M",), _first_sixteenth, "Q5_K"),
    ("ffn_down", ("Q3_K_M",), _always, "Q4_K"),
    ("ffn_down", ("Q2_K",), _always, "Q3_K"),
    ("ffn_down", ("Q5_0",), _first_eighth_with_imatrix, "Q5_1"),
    ("ffn_down", ("Q4_0",), _first_eighth_with_imatrix, "Q4_1"),
)

# Matrices that keep their type: small, and sensitive to quantisation.
_NEVER_QUANTISED = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")

# Types for rows that are not a multiple of the type's block. Rows that are not a multiple of 32 become F16.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Mix:
    """A file type with the user's overrides; made by `make_mix`.

    output, embedding: types of the output matrix and of the token embedding.
    tensors: (regular expression, type) pairs; the first that matches a part of a tensor's name applies.
    pure: use the default type for every tensor without an override.
    """

    file_type: FileType
    output: str | None = None
    embedding: str | None = None
    tensors: tuple[tuple[str, str], ...] = field(default=())
    pure: bool = False

    def type_of(self, name: str, shape: tuple[int, ...], source_type: str, model: Model) -> str:
        """Return the type of a tensor in the quantised file.

        shape is row-major. Raises OptionError if the rows are not a multiple of the block of an override's type.
        """
        if not is_quantised(name, shape):
            return source_type
        override = self._override(name)
        if override is not None:
            block_elements = TENSOR_TYPES_BY_NAME[override].block_elements
            if shape[-1] % block_elements:
                raise OptionError(
                    f"{name} has rows of {shape[-1]} weights, expected a multiple of {block_elements} "
                    f"for the type {override}"
                )
            return override
        default = self.file_type.default
        if default in FLOAT_TYPES:
            return default
        return _fallback(default if self.pure else self._mixed(name, shape, model), shape[-1])

    def _override(self, name: str) -> str | None:
        if name == "token_embd.weight" and self.embedding is not None:
            return self.embedding
        if name == "output.weight" and self.output is not None:
            return self.output
        return next((type_name for pattern, type_name in self.tensors if re.search(pattern, name)), None)

    def _mixed(self, name: str, shape: tuple[int, ...], model: Model) -> str:
        default = self.file_type.default
        if name == "output.weight" or (name == "token_embd.weight" and model.is_tied):
            if self.output is not None:
                return self.output
            fits = shape[-1] % TENSOR_TYPES_BY_NAME[default].block_elements == 0
            return "Q6_K" if fits and default != "Q8_0" else "Q8_0"
        layer = _layer(name)
        for part, file_types, condition, type_name in _RULES:
            if part in name and self.file_type.name in file_types and condition(model, layer or 0):
                return type_name
        return default


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a mix decides the type of a tensor: weight matrices and stacks of them, except small ones."""
    is_matrix = any(size > 1 for size in shape[:-1])
    return is_matrix and name.endswith("weight") and not any(part in name for part in _NEVER_QUANTISED)


def _fallback(type_name: str, n_cols: int) -> str:
    if n_cols % TENSOR_TYPES_BY_NAME[type_name].block_elements == 0:
        return type_name
    fallback = _FALLBACKS.get(type_name, "F16")
    return fallback if n_cols % TENSOR_TYPES_BY_NAME[fallback].block_elements == 0 else "F16"


def _layer(name: str) -> int | None:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


def make_mix(
    file_type: str,
    output: str | None = None,
    embedding: str | None = None,
    tensors: Sequence[tuple[str, str]] = (),
    *,
    pure: bool = False,
) -> Mix:
    """Return a Mix; names of types are case-insensitive.

    file_type: a key of FILE_TYPES. The other arguments are the fields of Mix.
    Raises OptionError for an unknown type or an invalid regular expression.
    """
    row = FILE_TYPES.get(file_type.upper())
    if row is None:
        raise OptionError(f"unknown file type {file_type!r}, expected one of {', '.join(FILE_TYPES)}")
    for pattern, _ in tensors:
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptionError(f"invalid regular expression {pattern!r}: {error}") from None
    return Mix(
        row,
        output and _type_name(output),
        embedding and _type_name(embedding),
        tuple((pattern, _type_name(type_name)) for pattern, type_name in tensors),
        pure,
    )


def _type_name(name: str) -> str:
    if name.upper() not in TENSOR_TYPES_BY_NAME:
        raise OptionError(f"unknown tensor type {name!r}, expected one of {', '.join(TENSOR_TYPES_BY_NAME)}")
    return name.upper()
