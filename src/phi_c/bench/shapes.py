"""Sizes of published models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the `phi3` architecture, from its config.json."""

    name: str
    n_layers: int
    n_embd: int
    n_ffn: int
    n_heads: int
    n_kv_heads: int
    rope_dims: int
    n_vocab: int
    n_ctx_train: int  # tokens
    n_ctx_orig: int  # tokens; a model with n_ctx_orig < n_ctx_train has LongRoPE factors
    tied: bool = False  # the embedding is also the output matrix

    @property
    def head_dim(self) -> int:
        """Elements per attention head."""
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
