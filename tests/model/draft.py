"""A tiny model file whose keys and tensors a test changes before the file is written and read."""

import math
import struct
from pathlib import Path
from typing import Any

from phi_c.gguf.reader import GGUFFile
from phi_c.model.config import ModelConfig, read_config
from raw_gguf import STRING, U32, gguf, key, tensor

N_EMBD, N_FFN, N_HEADS, N_KV_HEADS, N_VOCAB, N_LAYERS = 32, 48, 4, 2, 10, 2
N_EXPERTS = 3
HEAD_DIM = N_EMBD // N_HEADS
TYPE_BYTES = {0: 4, 1: 2, 30: 2}  # F32, F16, BF16
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


class Draft:
    """A model file that is not written yet.

    keys: metadata key -> (GGUF type, value).
    shapes: tensor name -> row-major shape.
    types: tensor name -> type id; F32 if absent.
    values: tensor name -> float32 values; zeros if absent.
    """

    def __init__(self, path: Path, architecture: str) -> None:
        self.path = path
        self.architecture = architecture
        self.keys: dict[str, tuple[int, Any]] = {
            "general.architecture": (STRING, architecture),
            "general.name": (STRING, "Tiny"),
        }
        for name, value in {
            "context_length": 4096,
            "block_count": N_LAYERS,
            "embedding_length": N_EMBD,
            "feed_forward_length": N_FFN,
            "attention.head_count": N_HEADS,
            "attention.head_count_kv": N_KV_HEADS,
        }.items():
            self.set(name, U32, value)
        self.shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (N_VOCAB, N_EMBD),
            "output_norm.weight": (N_EMBD,),
        }
        kv_rows = N_KV_HEADS * HEAD_DIM
        block: dict[str, tuple[int, ...]] = {"attn_norm": (N_EMBD,), "ffn_norm": (N_EMBD,)}
        block |= {"attn_output": (N_EMBD, N_EMBD), "ffn_down": (N_EMBD, N_FFN)}
        if architecture == "phi3":
            block |= {"attn_qkv": (N_EMBD + 2 * kv_rows, N_EMBD), "ffn_up": (2 * N_FFN, N_EMBD)}
        else:
            block |= {"attn_q": (N_EMBD, N_EMBD), "attn_k": (kv_rows, N_EMBD), "attn_v": (kv_rows, N_EMBD)}
            block |= {"ffn_gate": (N_FFN, N_EMBD), "ffn_up": (N_FFN, N_EMBD)}
        biased: set[str] = set()
        if architecture == "phi2":
            del block["ffn_norm"], block["ffn_gate"]
            biased = set(block)
        if architecture == "phimoe":
            for name in ("ffn_gate", "ffn_up", "ffn_down"):
                block[f"{name}_exps"] = (N_EXPERTS, *block.pop(name))
            biased = {name for name in block if "ffn" not in name} | {"ffn_norm"}
            block["ffn_gate_inp"] = (N_EXPERTS, N_EMBD)
            self.set("expert_count", U32, N_EXPERTS)
            self.set("expert_used_count", U32, 2)
        if biased:
            self.shapes |= {"output_norm.bias": (N_EMBD,), "output.bias": (N_VOCAB,)}
        for layer in range(N_LAYERS):
            self.shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
            self.shapes |= {f"blk.{layer}.{name}.bias": (block[name][0],) for name in biased}
        self.types: dict[str, int] = {}
        self.values: dict[str, list[float]] = {}

    def set(self, name: str, type_id: int, value: object) -> None:
        """Set a key of the architecture."""
        self.keys[f"{self.architecture}.{name}"] = (type_id, value)

    def remove(self, name: str) -> None:
        """Remove a key of the architecture."""
        del self.keys[f"{self.architecture}.{name}"]

    def add_long_rope(self, factor: float = 1.5) -> None:
        """Add long and short factors, all of the same value."""
        for name in (ROPE_LONG, ROPE_SHORT):
            self.shapes[name] = (HEAD_DIM // 2,)
            self.values[name] = [factor] * (HEAD_DIM // 2)

    def open(self) -> GGUFFile:
        """Write and open the file."""
        entries, data = [], b""
        for name, shape in self.shapes.items():
            type_id = self.types.get(name, 0)
            entries.append(tensor(name, shape[::-1], type_id, len(data)))
            n_bytes = math.prod(shape) * TYPE_BYTES.get(type_id, 4)
            raw = struct.pack(f"<{len(self.values.get(name, ()))}f", *self.values.get(name, ()))
            data += raw.ljust(-(-n_bytes // 32) * 32, b"\0")
        self.path.write_bytes(gguf([key(name, *value) for name, value in self.keys.items()], entries, data))
        return GGUFFile(self.path)

    def read(self) -> ModelConfig:
        """Write the file and return its configuration."""
        with self.open() as file:
            return read_config(file)
