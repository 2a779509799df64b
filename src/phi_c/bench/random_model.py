"""Writes models with random weights. Tensors, types and sizes are those of published Q4_K_M files, and so is the speed.

The generated text and most of the vocabulary are meaningless. Quants are random bytes, since all values are valid.
Scales give weights the standard deviation of a freshly initialised model, which keeps activations and logits in the
usual range.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi_c.bench.shapes import SHAPES, Shape
from phi_c.errors import CacheError, OptionError
from phi_c.gguf import writer
from phi_c.gguf.types import TENSOR_TYPES_BY_NAME
from phi_c.model.config import ROPE_LONG, ROPE_SHORT, ModelConfig, expected_tensors
from phi_c.quantize.mix import Model, make_mix
from phi_c.storage import atomic_write, cache_dir
from phi_c.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN

Bytes = npt.NDArray[np.uint8]

_CHUNK_BYTES = 16 << 20
_MIX = make_mix("Q4_K_M")

# By type: byte offsets in a block of the float16 scale and, if there is one, of the float16 scale of the minima; the
# mean quant, by which the minima are multiplied to centre the weights; the weights' standard deviation at scale 1.
_SCALES = {
    "Q4_K": ((0, 2), 7.5, 250.0),
    "Q5_K": ((0, 2), 15.5, 520.0),
    "Q6_K": ((208,), 0.0, 1370.0),
}


def random_model(name: str, progress: Callable[[int, int], object] = lambda n_written, n_total: None) -> Path:
    """Return the path of a random model, random/NAME.gguf in the cache folder; the file is written if it is missing.

    name: a key of SHAPES. progress: called with (bytes written, total bytes).
    Raises OptionError for an unknown name, CacheError if the file cannot be written.
    """
    shape = SHAPES.get(name)
    if shape is None:
        raise OptionError(f"there are no random weights for {name!r}, expected one of {', '.join(SHAPES)}")
    path = cache_dir() / "random" / f"{name}.gguf"
    if not path.is_file():
        plan = make_plan(shape)
        rng = np.random.default_rng(0)
        with atomic_write(path, CacheError) as file:
            writer.write(file, plan, (_data(rng, tensor) for tensor in plan.tensors), progress)
    return path


def make_plan(shape: Shape) -> writer.Plan:
    """Return the metadata and the tensors of the random model of a shape."""
    config = _config(shape)
    metadata = {
        "general.architecture": writer.string(config.architecture),
        "general.name": writer.string(config.name),
        "general.file_type": writer.u32(_MIX.file_type.number),
        "phi3.block_count": writer.u32(config.n_layers),
        "phi3.context_length": writer.u32(config.n_ctx_train),
        "phi3.embedding_length": writer.u32(config.n_embd),
        "phi3.feed_forward_length": writer.u32(config.n_ffn),
        "phi3.attention.head_count": writer.u32(config.n_heads),
        "phi3.attention.head_count_kv": writer.u32(config.n_kv_heads),
        "phi3.rope.dimension_count": writer.u32(config.rope_dims),
        "phi3.rope.scaling.original_context_length": writer.u32(config.n_ctx_orig),
        "phi3.attention.layer_norm_rms_epsilon": writer.f32(config.norm_eps),
    }
    return writer.Plan(metadata | _vocabulary(config.n_vocab), _tensors(shape, config))


def _config(shape: Shape) -> ModelConfig:
    return ModelConfig(
        architecture="phi3",
        name=f"{shape.name}, random weights",
        n_layers=shape.n_layers,
        n_embd=shape.n_embd,
        n_ffn=shape.n_ffn,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        rope_dims=shape.rope_dims,
        n_vocab=shape.n_vocab,
        n_ctx_train=shape.n_ctx_train,
        n_ctx_orig=shape.n_ctx_orig,
        long_rope=shape.n_ctx_orig < shape.n_ctx_train,
        norm_eps=1e-5,
        rope_style="neox",
        rope_freq_base=10000.0,
        rope_attn_factor=1.0,
        window=None,
        rope_scale=1.0,
        fused_qkv=True,
        fused_gate_up=True,
    )


def _tensors(shape: Shape, config: ModelConfig) -> tuple[writer.TensorSpec, ...]:
    tensors, optional = expected_tensors(config)
    if not shape.tied:
        tensors["output.weight"] = optional["output.weight"]
    if config.long_rope:
        tensors |= {name: optional[name] for name in (ROPE_LONG, ROPE_SHORT)}
    model = Model(shape.n_layers, n_gqa=shape.n_heads // shape.n_kv_heads, is_tied=shape.tied)
    return tuple(
        writer.TensorSpec(name, dims, _MIX.type_of(name, dims, "F32", model)) for name, dims in tensors.items()
    )


def _vocabulary(n_vocab: int) -> dict[str, bytes]:
    """Return a SentencePiece vocabulary with byte fallback, padded to n_vocab with tokens that do not occur in text."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<s>", "</s>", "<|endoftext|>"]  # llama.cpp does not load a Phi-3 model without <|endoftext|>
    tokens = ["<unk>", *special, *byte_tokens, "\u2581"]  # U+2581 stands for a space
    tokens += [f"\u2581token{i}" for i in range(len(tokens), n_vocab)]
    kinds = [UNKNOWN, *[CONTROL] * len(special), *[BYTE] * 256]
    kinds += [NORMAL] * (n_vocab - len(kinds))
    return {
        "tokenizer.ggml.model": writer.string("llama"),
        "tokenizer.ggml.tokens": writer.strings(tokens),
        "tokenizer.ggml.scores": writer.f32_array([-float(i) for i in range(n_vocab)]),
        "tokenizer.ggml.token_type": writer.i32_array(kinds),
        "tokenizer.ggml.bos_token_id": writer.u32(1),
        "tokenizer.ggml.eos_token_id": writer.u32(2),
        "tokenizer.ggml.unknown_token_id": writer.u32(0),
        "tokenizer.ggml.add_bos_token": writer.boolean(True),
    }


def _data(rng: np.random.Generator, tensor: writer.TensorSpec) -> Iterator[bytes]:
    """Yield the data of a tensor in chunks of at most 16 MiB."""
    if tensor.type_name == "F32":
        increase = {ROPE_LONG: 30.0, ROPE_SHORT: 0.5}.get(tensor.name, 0.0)  # norms are 1
        yield np.linspace(1, 1 + increase, tensor.shape[0], dtype="<f4").tobytes()
        return
    std = 1.0 if tensor.name == "token_embd.weight" else tensor.shape[-1] ** -0.5
    block_bytes = TENSOR_TYPES_BY_NAME[tensor.type_name].block_bytes
    n_left = tensor.n_bytes // block_bytes
    while n_left:
        n_blocks = min(n_left, _CHUNK_BYTES // block_bytes)
        yield _blocks(rng, tensor.type_name, n_blocks, std).tobytes()
        n_left -= n_blocks


def _blocks(rng: np.random.Generator, type_name: str, n_blocks: int, std: float) -> Bytes:
    """Return random blocks, uint8 [n_blocks, block_bytes], whose weights have a standard deviation of `std`."""
    offsets, mean_quant, unit_std = _SCALES[type_name]
    block_bytes = TENSOR_TYPES_BY_NAME[type_name].block_bytes
    blocks = np.frombuffer(bytearray(rng.bytes(n_blocks * block_bytes)), np.uint8).reshape(n_blocks, -1)
    for offset, factor in zip(offsets, (1.0, mean_quant), strict=False):
        scale = np.asarray(factor * std / unit_std, "<f2")
        blocks[:, offset : offset + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks
