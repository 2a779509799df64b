"""Writes the seed corpus of the fuzzers, deterministically: `PYTHONPATH=tests python tests/fuzz/make_corpus.py`."""

from pathlib import Path
from typing import Any

import numpy as np

from tiny_gguf import write_tiny

CORPUS = Path(__file__).with_name("corpus")
SMALL = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "chat_template": False}
TINY = {**SMALL, "n_embd": 8, "n_ffn": 8, "head_dim": 4, "rope_dims": 4}
ONE_BLOCK = {**SMALL, "n_embd": 32, "n_ffn": 32, "head_dim": 16, "rope_dims": 16}

N_TYPES = 13  # rows of csrc/tensor_types.def

# name -> architecture, type, fields of tiny_gguf.Shape
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi3-f32": ("phi3", "F32", {**TINY, "vocabulary": "few-spm", "n_ctx_orig": 64, "window": 16}),
    "phi3-q4_0": ("phi3", "Q4_0", {**ONE_BLOCK, "vocabulary": "few-spm", "tied": True}),
    "llama-f16": ("llama", "F16", {**TINY, "vocabulary": "few-bpe"}),
    "llama-q8_0": ("llama", "Q8_0", {**ONE_BLOCK, "vocabulary": "few-bpe", "tied": True}),
    "phi2-bf16": ("phi2", "BF16", {**TINY, "vocabulary": "few-bpe", "fused_qkv": False}),
    "phimoe-f32": ("phimoe", "F32", {**TINY, "vocabulary": "few-spm", "n_experts": 2}),
}


def main() -> None:
    """Write all files."""
    for name, (architecture, weight_type, fields) in MODELS.items():
        write_tiny(CORPUS / "loader" / name, architecture, weight_type, **fields)
    rng = np.random.default_rng(0)
    for i in range(N_TYPES):
        # All tiers, requantised; type i, 16 rows, 1 to 3 blocks per row, 17 tokens, aligned. See weights.c.
        header = bytes([0, 0, (i + 5) % N_TYPES, i, 15, i % 3, 16, 0])
        (CORPUS / "weights" / f"type-{i}").write_bytes(header + rng.bytes(240))
    for i in range(8):
        (CORPUS / "forward" / f"random-{i}").write_bytes(rng.bytes(200))


if __name__ == "__main__":
    main()
