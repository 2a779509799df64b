"""SmolLM2's published GGUF file, dequantised to a Hugging Face folder and converted: tensors and tokens are equal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hf_files import write_safetensors

import gguf
from phi_c import llm
from phi_c.convert.run import convert
from phi_c.gguf.reader import GGUFFile
from phi_c.text.backend import build_backend
from phi_c.text.vocabulary import CONTROL, read_vocabulary

Floats = npt.NDArray[np.float32]

# GGUF name -> transformers name, independent of the table in model/architectures.py.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def dequantise_to_folder(path: Path, folder: Path) -> dict[str, Floats]:
    """Write a float32 folder; return GGUF name -> tensor, with the rows of q and k interleaved as in the GGUF file."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    key: Any = lambda name: reader.fields[f"llama.{name}"].contents()  # noqa: E731
    heads = {"attn_q": int(key("attention.head_count")), "attn_k": int(key("attention.head_count_kv"))}
    stored = {}
    for name, values in tensors.items():
        if name in MODEL:
            stored[MODEL[name]] = ("F32", values)
            continue
        _, layer, kind, _ = name.split(".")
        if kind in heads:
            pairs = values.reshape(heads[kind], -1, 2, values.shape[1])
            values = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(values.shape)
        stored[f"model.layers.{layer}.{LAYER[kind]}.weight"] = ("F32", values)
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", stored)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_theta": key("rope.freq_base"),
        "tie_word_embeddings": True,
        "vocab_size": len(tensors["token_embd.weight"]),
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(path, folder)
    return tensors


def write_tokenizer(path: Path, folder: Path) -> None:
    metadata = GGUFFile(path).metadata
    vocabulary = read_vocabulary(metadata)
    content = json.loads(build_backend(vocabulary).to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [
        {"id": i, "content": token, **flags}
        for i, token in enumerate(vocabulary.tokens)
        if vocabulary.kinds[i] == CONTROL
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert vocabulary.bos_id is not None
    assert vocabulary.eos_id is not None
    config = {
        "bos_token": vocabulary.tokens[vocabulary.bos_id],
        "eos_token": vocabulary.tokens[vocabulary.eos_id],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.exhaustive
def test_smollm2_round_trip(smollm2_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "SmolLM2"
    tensors = dequantise_to_folder(smollm2_path, folder)
    output = convert(folder, tmp_path / "m.gguf")
    (folder / "model.safetensors").unlink()
    reader = gguf.GGUFReader(output)
    assert {t.name for t in reader.tensors} == set(tensors)
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, tensors[tensor.name]), tensor.name
    ours, theirs = GGUFFile(output).metadata, GGUFFile(smollm2_path).metadata
    added = "tokenizer.ggml.add_bos_token"
    assert ours.get(added, False) == theirs.get(added, False)
    for key in ("pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        assert np.array_equal(ours[f"tokenizer.ggml.{key}"], theirs[f"tokenizer.ggml.{key}"]), key
    assert ours["tokenizer.chat_template"] == theirs["tokenizer.chat_template"]
    with llm.load(output, n_ctx=128) as model, llm.load(smollm2_path, n_ctx=128) as original:
        answer = model.generate("The capital of France is", raw=True, max_tokens=1, temperature=0)
        assert answer.text == " Paris"
        prompt = model.tokenizer.encode("The harbour lay still under a pale sky, and the")
        a, b = model.logits(prompt), original.logits(prompt)
    # The original quantises its activations to int8, which is the only difference.
    assert ((a - b) ** 2).sum() / (a**2).sum() <= 2e-3
    output.unlink()
