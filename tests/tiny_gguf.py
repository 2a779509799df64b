"""Writes tiny GGUF files: seeded random weights in the structure of Phi and Llama models, and a usable vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

import gguf

Array = npt.NDArray[Any]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_WORDS = ["the", "th", "he", "in", "an", "and", "ing", "er", "to", "of", "is", "it", "on", "at", "or", "ed", "re"]
_PHI3_SPECIAL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]

# Type -> byte offsets of the block's scale and, if it has one, of its minimum's scale; the mean quant, by which the
# minimum's scale must be larger for the weights to have a mean of 0; the standard deviation of the weights at scale 1.
_BLOCKS = {
    "Q2_K": ((80, 82), 1.5, 13.0),
    "Q3_K": ((108,), 0.0, 42.0),
    "Q4_K": ((0, 2), 7.5, 240.0),
    "Q5_K": ((0, 2), 15.5, 520.0),
    "Q6_K": ((208,), 0.0, 1370.0),
}


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a model; n_embd and n_ffn default to multiples of 256, the block size of K-quants."""

    n_layers: int = 2
    n_embd: int = 256
    n_ffn: int = 512
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    rope_dims: int = 64
    n_ctx: int = 512
    window: int | None = None
    n_ctx_orig: int | None = None  # original context; not None adds LongRoPE factors
    tied: bool = False
    chat_template: bool = True
    vocabulary: str = "spm"  # spm, bpe, few-spm or few-bpe; few: about ten tokens
    n_experts: int = 8  # phimoe only
    fused_qkv: bool = True  # phi2 only
    n_extra_words: int = 0  # additional tokens; spm only


def write_tiny(
    path: Path, architecture: str = "phi3", weight_type: str = "Q4_K", seed: int = 0, **overrides: Any
) -> Path:
    """Write a random model whose matrices all have one type, and return path; overrides: fields of Shape."""
    shape = replace(Shape(), **overrides)
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    tokens = _add_vocabulary(writer, shape)
    _add_sizes(writer, architecture, shape)
    for name, rows, cols in _matrices(architecture, shape, len(tokens)):
        scale = 1.0 if name == "token_embd.weight" else cols**-0.5
        kind = "F32" if "ffn_gate_inp" in name else weight_type
        data = _matrix(rng, kind, rows, cols, scale)
        if "_exps" in name:
            data = data.reshape(shape.n_experts, rows // shape.n_experts, -1)
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    for name, n in _vectors(architecture, shape, len(tokens)):
        mean = 0.0 if name.endswith(".bias") else 1.0
        writer.add_tensor(name, rng.normal(mean, 0.1, n).astype(np.float32))
    if shape.n_ctx_orig is not None:
        half = shape.rope_dims // 2
        writer.add_tensor("rope_factors_short.weight", np.linspace(1, 1.5, half, dtype=np.float32))
        writer.add_tensor("rope_factors_long.weight", np.linspace(1, 40, half, dtype=np.float32))
    write_and_close(writer)
    return path


def write_and_close(writer: gguf.GGUFWriter) -> None:
    """Write the header, metadata and tensors of a GGUFWriter, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrices(architecture: str, s: Shape, n_vocab: int) -> list[tuple[str, int, int]]:
    """Return (name, rows, columns) of all matrices; the experts' matrices are concatenated by rows."""
    q_rows, kv_rows = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    matrices = [("token_embd.weight", n_vocab, s.n_embd)]
    if not s.tied:
        matrices.append(("output.weight", n_vocab, s.n_embd))
    for i in range(s.n_layers):
        if architecture == "phi3" or (architecture == "phi2" and s.fused_qkv):
            layer = [("attn_qkv", q_rows + 2 * kv_rows, s.n_embd)]
        else:
            layer = [("attn_q", q_rows, s.n_embd), ("attn_k", kv_rows, s.n_embd), ("attn_v", kv_rows, s.n_embd)]
        layer += [("attn_output", s.n_embd, q_rows), *_feed_forward(architecture, s)]
        matrices += [(f"blk.{i}.{name}.weight", rows, cols) for name, rows, cols in layer]
    return matrices


def _feed_forward(architecture: str, s: Shape) -> list[tuple[str, int, int]]:
    down = ("ffn_down", s.n_embd, s.n_ffn)
    if architecture == "phi3":
        return [("ffn_up", 2 * s.n_ffn, s.n_embd), down]
    if architecture == "phi2":
        return [("ffn_up", s.n_ffn, s.n_embd), down]
    if architecture == "llama":
        return [("ffn_gate", s.n_ffn, s.n_embd), ("ffn_up", s.n_ffn, s.n_embd), down]
    n = s.n_experts
    experts = [("ffn_gate_exps", n * s.n_ffn, s.n_embd), ("ffn_up_exps", n * s.n_ffn, s.n_embd)]
    return [("ffn_gate_inp", n, s.n_embd), *experts, ("ffn_down_exps", n * s.n_embd, s.n_ffn)]


def _vectors(architecture: str, s: Shape, n_vocab: int) -> list[tuple[str, int]]:
    """Return (name, size) of the norms and of the biases, for architectures that have biases."""
    norms = ["attn_norm"] if architecture == "phi2" else ["attn_norm", "ffn_norm"]
    vectors = [(f"blk.{i}.{name}.weight", s.n_embd) for i in range(s.n_layers) for name in norms]
    vectors.append(("output_norm.weight", s.n_embd))
    if architecture in ("phi3", "llama"):
        return vectors
    biases = [(name.replace(".weight", ".bias"), n) for name, n in vectors]
    biases += [
        (name.replace(".weight", ".bias"), rows)
        for name, rows, _ in _matrices(architecture, s, n_vocab)
        if name not in ("token_embd.weight", "output.weight") and "_exps" not in name and "_inp" not in name
    ]
    return [*vectors, *biases, ("output.bias", n_vocab)]


def _matrix(rng: np.random.Generator, weight_type: str, rows: int, cols: int, scale: float) -> Array:
    kind = GGMLQuantizationType[weight_type]
    if weight_type not in _BLOCKS:
        weights = (rng.normal(size=(rows, cols)) * scale).astype(np.float32)
        return weights if weight_type == "F32" else gguf.quants.quantize(weights, kind)
    # The gguf package cannot quantise to K-quants. Any bytes are valid quants; only the scales must be finite.
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, cols // block_elements, block_bytes), dtype=np.uint8)
    offsets, mean, deviation = _BLOCKS[weight_type]
    d = rng.uniform(0.5, 1, blocks.shape[:2]) * scale / deviation
    for offset, factor in zip(offsets, (1.0, mean), strict=False):
        halves = (d * factor).astype(np.float16)
        blocks[:, :, offset : offset + 2] = halves.view(np.uint8).reshape(*blocks.shape[:2], 2)
    return blocks.reshape(rows, -1)


def _add_sizes(writer: gguf.GGUFWriter, architecture: str, s: Shape) -> None:
    writer.add_name(f"tiny {architecture}")
    writer.add_block_count(s.n_layers)
    writer.add_embedding_length(s.n_embd)
    writer.add_feed_forward_length(s.n_ffn)
    writer.add_head_count(s.n_heads)
    writer.add_head_count_kv(s.n_kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_dimension_count(s.rope_dims)
    writer.add_context_length(s.n_ctx)
    if architecture == "phi2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "phimoe":
        writer.add_expert_count(s.n_experts)
        writer.add_expert_used_count(2)
    if s.window is not None:
        writer.add_sliding_window(s.window)
    if s.n_ctx_orig is not None:
        writer.add_rope_scaling_orig_ctx_len(s.n_ctx_orig)


def _add_vocabulary(writer: gguf.GGUFWriter, s: Shape) -> list[str]:
    return {"spm": _add_spm, "bpe": _add_bpe, "few-spm": _add_few_spm, "few-bpe": _add_few_bpe}[s.vocabulary](writer, s)


def _add_few_spm(writer: gguf.GGUFWriter, s: Shape) -> list[str]:
    """Add one or a few tokens of each type."""
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581ab", "<|end|>", "<|so|>", ""]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 7 + [-1.0, -2.0] + [0.0] * 3)
    writer.add_token_types([2, 3, 3, 6, 1, 1, 1, 1, 1, 3, 4, 5])
    _add_ids(writer, {"bos": 1, "eos": 2, "unk": 0})
    writer.add_add_bos_token(True)
    return tokens


def _add_few_bpe(writer: gguf.GGUFWriter, s: Shape) -> list[str]:
    tokens = ["<|endoftext|>", "<|so|>", "a", "b", "\u0120", "ab", "\u0120ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 4, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "\u0120 ab"])
    _add_ids(writer, {"bos": 0, "eos": 0})
    writer.add_add_bos_token(False)
    return tokens


def _add_spm(writer: gguf.GGUFWriter, s: Shape) -> list[str]:
    """Add a SentencePiece vocabulary with byte fallback and Phi-3's special tokens."""
    words = [w for word in _WORDS for w in (word, "\u2581" + word)]
    words += [f"xq{i}" for i in range(s.n_extra_words)]
    letters = ["\u2581", *(chr(c) for c in range(0x21, 0x7F))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters, *_PHI3_SPECIAL]
    n_plain = len(words) + len(letters)
    kinds = [2, 3, 3, *([6] * 256), *([1] * n_plain), *([3] * len(_PHI3_SPECIAL))]
    scores = [0.0] * 259 + [-float(i) for i in range(n_plain)] + [0.0] * len(_PHI3_SPECIAL)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    _add_ids(writer, {"bos": 1, "eos": tokens.index("<|endoftext|>"), "unk": 0})
    writer.add_add_bos_token(True)
    if s.chat_template:
        writer.add_chat_template(PHI3)
    return tokens


def _add_bpe(writer: gguf.GGUFWriter, s: Shape) -> list[str]:
    """Byte-level BPE as SmolLM's, with ChatML's special tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    characters = [*map(chr, printable), *(chr(0x100 + i) for i in range(len(others)))]
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("an", "d"), ("\u0120", "t"), ("\u0120t", "he")]
    merges[-1:] = [("h", "e"), ("\u0120t", "he")]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *characters, *("".join(m) for m in merges)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges([" ".join(m) for m in merges])
    _add_ids(writer, {"bos": 1, "eos": 2})
    writer.add_add_bos_token(False)
    if s.chat_template:
        writer.add_chat_template(CHATML)
    return tokens


def _add_ids(writer: gguf.GGUFWriter, ids: Mapping[str, int]) -> None:
    names = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id}
    for name, token in ids.items():
        names[name](token)


ALL_TYPES: Sequence[str] = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
