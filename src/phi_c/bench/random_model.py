"""Writes models of random weights: the tensors, types and sizes of published files, so that they run as fast.

Their text is noise, and so is their vocabulary. Quants are random bytes: any are valid. Scales are such that weights
deviate as much as those of a model at its initialisation, which keeps activations and logits in ordinary ranges.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

import gguf
from phi_c._core import TENSOR_TYPES, TensorType
from phi_c.bench.shapes import SHAPES, Shape, tensor_type
from phi_c.errors import CacheError, OptionError
from phi_c.model.config import ROPE_LONG, ROPE_SHORT, ModelConfig, expected_tensors
from phi_c.storage import atomic_write, cache_dir

Bytes = npt.NDArray[np.uint8]

_CHUNK_BYTES = 16 << 20
_MOSTLY_Q4_K_M = 15  # general.file_type
_TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}

# Where a block has its scale and that of its minima (half precision), the mean of its quants, by which minima must be
# the larger for weights to be centred, and how much weights deviate where the scale is 1.
_SCALES = {
    "Q4_K": ((0, 2), 7.5, 250.0),
    "Q5_K": ((0, 2), 15.5, 520.0),
    "Q6_K": ((208,), 0.0, 1370.0),
}


def random_model(name: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Return the file of a row of SHAPES, writing it to the cache (random/NAME.gguf) when it is not there.

    progress: is told how many bytes of all are written. Raises OptionError for an unknown name, CacheError.
    """
    shape = SHAPES.get(name)
    if shape is None:
        raise OptionError(f"there are no random weights for {name!r}, expected one of {', '.join(SHAPES)}")
    path = cache_dir() / "random" / f"{name}.gguf"
    if not path.is_file():
        with atomic_write(path, CacheError) as file:
            _write(file, shape, progress)
    return path


def _write(file: IO[bytes], shape: Shape, progress: Callable[[int, int], None]) -> None:
    rng = np.random.default_rng(0)
    tensors = _tensors(shape)
    header = _header(shape, tensors)
    total = len(header) + sum(_n_bytes(kind, dims) for dims, kind in tensors.values())
    _write_padded(file, [header])
    for name, (dims, kind) in tensors.items():
        _write_padded(file, _data(rng, name, dims, kind))
        progress(min(file.tell(), total), total)


def _write_padded(file: IO[bytes], chunks: list[bytes] | Iterator[bytes]) -> None:
    for chunk in chunks:
        file.write(chunk)
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _tensors(shape: Shape) -> dict[str, tuple[tuple[int, ...], TensorType]]:
    """Return name -> dimensions (rows first) and type."""
    required, optional = expected_tensors(_config(shape))
    if not shape.tied:
        required["output.weight"] = optional["output.weight"]
    if shape.n_ctx_orig < shape.n_ctx_train:
        required |= {name: optional[name] for name in (ROPE_LONG, ROPE_SHORT)}
    return {name: (dims, _TYPES[tensor_type(name, shape)]) for name, dims in required.items()}


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


def _header(shape: Shape, tensors: dict[str, tuple[tuple[int, ...], TensorType]]) -> bytes:
    config = _config(shape)
    with tempfile.TemporaryDirectory(prefix="phi-c-") as folder:
        path = Path(folder) / "header.gguf"
        writer = gguf.GGUFWriter(path, config.architecture)
        writer.add_name(config.name)
        writer.add_file_type(_MOSTLY_Q4_K_M)
        writer.add_block_count(config.n_layers)
        writer.add_context_length(config.n_ctx_train)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.n_ffn)
        writer.add_head_count(config.n_heads)
        writer.add_head_count_kv(config.n_kv_heads)
        writer.add_rope_dimension_count(config.rope_dims)
        writer.add_rope_scaling_orig_ctx_len(config.n_ctx_orig)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        _add_vocabulary(writer, config.n_vocab)
        for name, (dims, kind) in tensors.items():
            row_bytes = dims[-1] // kind.block_elements * kind.block_bytes
            writer.add_tensor_info(
                name,
                (*dims[:-1], row_bytes),
                np.dtype(np.uint8),
                _n_bytes(kind, dims),
                raw_dtype=gguf.GGMLQuantizationType(kind.type_id),
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()


def _add_vocabulary(writer: Any, n_vocab: int) -> None:
    """SentencePiece with byte fallback: texts are cut into bytes, the other tokens are words that never occur."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<s>", "</s>", "<|endoftext|>"]  # the last one: llama.cpp loads no Phi-3 without it
    tokens = ["<unk>", *special, *byte_tokens, "\u2581"]  # the last one is a space
    tokens += [f"\u2581token{i}" for i in range(len(tokens), n_vocab)]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * len(special), *[gguf.TokenType.BYTE] * 256]
    kinds += [gguf.TokenType.NORMAL] * (n_vocab - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(n_vocab)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def _n_bytes(kind: TensorType, dims: tuple[int, ...]) -> int:
    n_elements = dims[0] if len(dims) == 1 else dims[0] * dims[1]
    return n_elements // kind.block_elements * kind.block_bytes


def _data(rng: np.random.Generator, name: str, dims: tuple[int, ...], kind: TensorType) -> Iterator[bytes]:
    """Yield the bytes of a tensor, in parts that take little memory."""
    if kind.name == "F32":
        spread = 30.0 if name == ROPE_LONG else 0.5 if name == ROPE_SHORT else 0.0  # norms are 1
        yield np.linspace(1, 1 + spread, dims[0], dtype="<f4").tobytes()
        return
    deviation = 1.0 if name == "token_embd.weight" else dims[-1] ** -0.5
    n_left = _n_bytes(kind, dims) // kind.block_bytes
    while n_left:
        n_blocks = min(n_left, _CHUNK_BYTES // kind.block_bytes)
        yield _blocks(rng, kind, n_blocks, deviation).tobytes()
        n_left -= n_blocks


def _blocks(rng: np.random.Generator, kind: TensorType, n_blocks: int, deviation: float) -> Bytes:
    """Return random blocks, uint8 [n_blocks, block_bytes], whose weights deviate so much."""
    offsets, mean_quant, unit_deviation = _SCALES[kind.name]
    blocks = np.frombuffer(bytearray(rng.bytes(n_blocks * kind.block_bytes)), np.uint8).reshape(n_blocks, -1)
    for offset, factor in zip(offsets, (1.0, mean_quant), strict=False):
        scale = np.asarray(factor * deviation / unit_deviation, "<f2")
        blocks[:, offset : offset + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks
