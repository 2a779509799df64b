"""Writes small Hugging Face model folders, with random weights and a trained tokenizer, without its libraries."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from small_tokenizers import save_tokenizer

Array = npt.NDArray[Any]
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> Path:
    """Write a safetensors file and return its path; tensors: name -> (dtype, values), BF16 values as uint16 bits."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, values) in tensors.items():
        assert values.dtype == DTYPES[dtype]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(values).tobytes() for _, values in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_folder(path: Path, architecture: str = "Phi3", dtype: str = "F32", **config: Any) -> Path:
    """Write a model with two layers and return path; config: keys to change in config.json."""
    settings: dict[str, Any] = {
        "architectures": [f"{architecture}ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    n_vocab = save_tokenizer(path, "phi-3" if architecture == "Phi3" else "smollm2")
    settings |= {"vocab_size": n_vocab + 3, **config}
    (path / "config.json").write_text(json.dumps(settings))
    write_safetensors(path / "model.safetensors", random_weights(architecture, settings, dtype))
    return path


def random_weights(architecture: str, settings: Mapping[str, Any], dtype: str) -> dict[str, tuple[str, Array]]:
    """Return transformers name -> (dtype, values) of all tensors, the same at every call."""
    rng = np.random.default_rng(0)
    e, f, v = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    kv = e // settings["num_attention_heads"] * settings["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, e), "model.norm.weight": (e,)}
    if not settings["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, e)
    for i in range(settings["num_hidden_layers"]):
        layer = {"input_layernorm": (e,), "post_attention_layernorm": (e,), "self_attn.o_proj": (e, e)}
        if architecture == "Phi3":
            layer |= {"self_attn.qkv_proj": (e + 2 * kv, e), "mlp.gate_up_proj": (2 * f, e)}
        else:
            layer |= {"self_attn.q_proj": (e, e), "self_attn.k_proj": (kv, e), "self_attn.v_proj": (kv, e)}
            layer |= {"mlp.gate_proj": (f, e), "mlp.up_proj": (f, e)}
        layer["mlp.down_proj"] = (e, f)
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    tensors = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32) * (1 if len(shape) == 1 else shape[-1] ** -0.5)
        tensors[name] = (dtype, cast(values, dtype))
    return tensors


def cast(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """Return float32 values in a safetensors type; BF16 is truncated, not rounded."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(DTYPES[dtype])


def shard(folder: Path) -> None:
    """Replace model.safetensors with two shards and an index."""
    from phi_c.convert.safetensors_file import read_header

    single = folder / "model.safetensors"
    stored = read_header(single)
    tensors = {name: (t.dtype, t.rows(0, t.shape[0]).reshape(t.shape)) for name, t in stored.items()}
    names = list(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, half in halves.items():
        write_safetensors(folder / file, {name: tensors[name] for name in half})
    shard_of = {name: file for file, half in halves.items() for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    single.unlink()
