"""Writes what fuzzing begins with: headers of small models of each architecture, and rows of weights of each type.

python tests/fuzz/make_corpus.py
"""

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from phi_c import _core
from phi_c.model.gguf_file import GGUFFile
from tiny_gguf import write_tiny

CORPUS = Path(__file__).with_name("corpus")
SMALL = {"n_layers": 1, "n_embd": 32, "n_ffn": 32, "n_heads": 1, "n_kv_heads": 1, "head_dim": 32, "rope_dims": 32}
HEADERS = {
    "phi3": ("phi3", {"window": 20, "chat_template": False}),
    "phi3-longrope": ("phi3", {"n_ctx": 64, "n_ctx_orig": 16, "vocabulary": "bpe"}),
    "llama": ("llama", {"tied": True, "vocabulary": "bpe"}),
    "phi2": ("phi2", {"vocabulary": "bpe", "chat_template": False}),
    "phimoe": ("phimoe", {"n_experts": 2, "vocabulary": "bpe"}),
}


def main() -> None:
    """Write the files; the same ones each time."""
    for folder in ("header", "weights"):
        (CORPUS / folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for name, (architecture, shape) in HEADERS.items():
            path = write_tiny(Path(work) / "tiny.gguf", architecture, "Q8_0", **SMALL, **shape)
            with GGUFFile(path) as file:
                header_bytes = file.data_offset
            (CORPUS / "header" / name).write_bytes(path.read_bytes()[:header_bytes])
    rng = random.Random(1)
    for i, traits in enumerate(_core.TENSOR_TYPES.values()):
        fields = bytes([i, (15, 47, 16)[i % 3], i % 2, (0, 16, 4)[i % 3], i])  # see fuzz_weights.c
        (CORPUS / "weights" / traits.name).write_bytes(fields + rng.randbytes(211))


if __name__ == "__main__":
    main()
