"""Which tensor gets which type in a quantised file: llama.cpp's mixes, a row of a table for each exception.

A file type such as Q4_K_M has a default type, and stores tensors that matter more in a better one. The rows follow
llama.cpp's src/llama-quant.cpp, in the form in which published Phi files were made: there, and here, the fused
`attn_qkv` has rows of its own. Releases of 2026 treat it like `attn_v`, so most of it has fewer bits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from phi_c._core import TENSOR_TYPES
from phi_c.errors import OptionError
from phi_c.gguf.reader import MetadataValue

TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class FileType:
    """A mix. number: general.file_type; default: the type of most tensors."""

    name: str
    number: int
    default: str


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
    """What the rows ask about a model."""

    n_layers: int
    n_gqa: int = 1  # query heads a key/value head
    n_experts: int = 0
    is_tied: bool = False  # the embedding serves as output
    has_imatrix: bool = False
    is_llama_70b: bool = False


def read_model(metadata: Mapping[str, MetadataValue], names: Sequence[str], *, has_imatrix: bool) -> Model:
    """Return what the rows ask about a file, from its metadata and the names of its tensors."""
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


def _more_bits(model: Model, layer: int) -> bool:
    """The first and the last eighth, and every third layer of those between."""
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


def _shares_values(model: Model, layer: int) -> bool:
    return model.n_gqa >= 4


def _first_eighth_by_imatrix(model: Model, layer: int) -> bool:
    return model.has_imatrix and _first_eighth(model, layer)


def _eight_experts(model: Model, layer: int) -> bool:
    return model.n_experts == 8


def _llama_70b(model: Model, layer: int) -> bool:
    return model.is_llama_70b


_FOUR_BITS_OR_LESS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")

# part of the tensor's name, file types, when, type: the first row that fits decides.
_ROWS: tuple[tuple[str, tuple[str, ...], Condition, str], ...] = (
    ("attn_v.weight", tuple(FILE_TYPES), _eight_experts, "Q8_0"),
    ("attn_k.weight", tuple(FILE_TYPES), _eight_experts, "Q8_0"),
    ("attn_v.weight", ("Q4_K_M", "Q5_K_M"), _more_bits, "Q6_K"),
    ("attn_v.weight", ("Q4_K_S",), _first_four, "Q5_K"),
    ("attn_v.weight", ("Q3_K_L",), _always, "Q5_K"),
    ("attn_v.weight", ("Q3_K_M",), _first_two, "Q5_K"),
    ("attn_v.weight", _FOUR_BITS_OR_LESS, _llama_70b, "Q5_K"),
    ("attn_v.weight", ("Q3_K_M",), _always, "Q4_K"),
    ("attn_v.weight", ("Q2_K",), _shares_values, "Q4_K"),
    ("attn_v.weight", ("Q2_K",), _always, "Q3_K"),
    ("attn_qkv.weight", ("Q5_K_M",), _always, "Q6_K"),
    ("attn_qkv.weight", ("Q4_K_M",), _always, "Q5_K"),
    ("attn_qkv.weight", ("Q3_K_L", "Q3_K_M"), _always, "Q4_K"),
    ("attn_output.weight", _FOUR_BITS_OR_LESS, _eight_experts, "Q5_K"),
    ("attn_output.weight", ("Q3_K_L",), lambda model, layer: model.n_experts != 8, "Q5_K"),
    ("attn_output.weight", ("Q3_K_M",), _always, "Q4_K"),
    ("attn_output.weight", ("Q2_K",), _always, "Q3_K"),
    ("ffn_down", ("Q4_K_M", "Q5_K_M"), _more_bits, "Q6_K"),
    ("ffn_down", ("Q4_K_S",), _first_eighth, "Q5_K"),
    ("ffn_down", ("Q3_K_L",), _always, "Q5_K"),
    ("ffn_down", ("Q3_K_M",), _first_sixteenth, "Q5_K"),
    ("ffn_down", ("Q3_K_M",), _always, "Q4_K"),
    ("ffn_down", ("Q2_K",), _always, "Q3_K"),
    ("ffn_down", ("Q5_0",), _first_eighth_by_imatrix, "Q5_1"),
    ("ffn_down", ("Q4_0",), _first_eighth_by_imatrix, "Q4_1"),
)

# Small, and sensitive: they stay as they are.
_KEPT = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")

# For rows whose length a type's block does not divide; for those that 32 does not divide either, F16.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Mix:
    """A file type, and what the user wants otherwise.

    output, embedding: types of the output matrix and the embedding. tensors: (regular expression, type), the first that
    is found in a tensor's name decides. pure: everything else in the default type.
    """

    file_type: FileType
    output: str | None = None
    embedding: str | None = None
    tensors: tuple[tuple[str, str], ...] = field(default=())
    pure: bool = False

    def type_of(self, name: str, shape: tuple[int, ...], type_now: str, model: Model) -> str:
        """Return the type in which a tensor is to be stored; raises OptionError where a type asked for does not fit."""
        if not is_quantised(name, shape):
            return type_now
        asked = self._asked_for(name)
        if asked is not None:
            if shape[-1] % TYPES[asked].block_elements:
                raise OptionError(
                    f"{name} has rows of {shape[-1]} weights, expected a multiple of {TYPES[asked].block_elements} "
                    f"for the type {asked}"
                )
            return asked
        default = self.file_type.default
        if default in FLOATS:
            return default
        return _fallback(default if self.pure else self._mixed(name, shape, model), shape[-1])

    def _asked_for(self, name: str) -> str | None:
        if name == "token_embd.weight" and self.embedding is not None:
            return self.embedding
        if name == "output.weight" and self.output is not None:
            return self.output
        return next((kind for pattern, kind in self.tensors if re.search(pattern, name)), None)

    def _mixed(self, name: str, shape: tuple[int, ...], model: Model) -> str:
        default = self.file_type.default
        if name == "output.weight" or (name == "token_embd.weight" and model.is_tied):
            if self.output is not None:
                return self.output
            fits = shape[-1] % TYPES[default].block_elements == 0
            return "Q6_K" if fits and default != "Q8_0" else "Q8_0"
        layer = _layer(name)
        for part, file_types, condition, kind in _ROWS:
            if part in name and self.file_type.name in file_types and condition(model, layer or 0):
                return kind
        return default


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is one that file types decide about: a matrix, or a stack of them."""
    is_matrix = sum(size > 1 for size in shape[:-1]) > 0
    return is_matrix and name.endswith("weight") and not any(part in name for part in _KEPT)


def _fallback(kind: str, n_cols: int) -> str:
    if n_cols % TYPES[kind].block_elements == 0:
        return kind
    instead = _FALLBACKS.get(kind, "F16")
    return instead if n_cols % TYPES[instead].block_elements == 0 else "F16"


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
    """Return a Mix of names in any case; raises OptionError for a name or a regular expression that is none."""
    row = FILE_TYPES.get(file_type.upper())
    if row is None:
        raise OptionError(f"{file_type!r} is no file type, expected one of {', '.join(FILE_TYPES)}")
    for pattern, _ in tensors:
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptionError(f"{pattern!r} is no regular expression: {error}") from None
    return Mix(
        row,
        output and _type_name(output),
        embedding and _type_name(embedding),
        tuple((pattern, _type_name(kind)) for pattern, kind in tensors),
        pure,
    )


def _type_name(name: str) -> str:
    if name.upper() not in TYPES:
        raise OptionError(f"{name!r} is no tensor type, expected one of {', '.join(TYPES)}")
    return name.upper()
