"""Sizes of published models, one row each, and the type of each tensor in their Q4_K_M files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a `phi3` model, from its config.json."""

    name: str
    n_layers: int
    n_embd: int
    n_ffn: int
    n_heads: int
    n_kv_heads: int
    rope_dims: int
    n_vocab: int
    n_ctx_train: int  # positions
    n_ctx_orig: int  # positions; less than n_ctx_train: the model has LongRoPE's factors
    tied: bool = False  # the embedding serves as output

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.n_embd // self.n_heads


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("phi-3-mini", 32, 3072, 8192, 32, 32, 96, 32064, 4096, 4096),
        Shape("phi-3.5-mini", 32, 3072, 8192, 32, 32, 96, 32064, 131072, 4096),
        Shape("phi-4-mini", 32, 3072, 8192, 24, 8, 96, 200064, 131072, 4096, tied=True),
        Shape("phi-3-medium", 40, 5120, 17920, 40, 10, 128, 32064, 4096, 4096),
        Shape("phi-4", 40, 5120, 17920, 40, 10, 128, 100352, 16384, 16384),
    )
}


def tensor_type(name: str, shape: Shape) -> str:
    """Return the type that llama.cpp's Q4_K_M mix gives a tensor of a `phi3` model."""
    if "norm" in name or name.startswith("rope_"):
        return "F32"
    if name == "output.weight" or (name == "token_embd.weight" and shape.tied):
        return "Q6_K"
    if ".attn_qkv." in name:
        return "Q5_K"
    if ".ffn_down." in name and _has_more_bits(int(name.split(".")[1]), shape.n_layers):
        return "Q6_K"
    return "Q4_K"


def _has_more_bits(layer: int, n_layers: int) -> bool:
    """Whether a layer is in the first or last eighth, or every third of those between."""
    eighth = n_layers // 8
    return not eighth <= layer < 7 * n_layers // 8 or (layer - eighth) % 3 == 2
