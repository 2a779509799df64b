"""A reference implementation of the forward pass in NumPy: float32 weights, dequantised by the gguf package.

Follows transformers' modeling_phi3.py, modeling_llama.py, modeling_phi.py and modeling_phimoe.py. Shares no code with
phi_c.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gguf

Floats = npt.NDArray[np.float32]

EXPERTS_PER_TOKEN = 2
JITTER_THRESHOLD = 0.02  # SparseMixer: experts whose relative score distance from the best is larger are masked


class Reference:
    """A model in float32.

    `logits` and `hidden_states` compute all tokens in one call, without a KV cache, and record:

    inputs: input of each matrix, by tensor name, float32 [n_tokens, n_cols].
    chosen_experts: experts of each token, by layer ("blk.N."), int64 [n_tokens, 2].
    routing_margins: relative score distance of each token's routing from a different one, over all layers, float32
        [n_tokens]; infinite without experts.
    """

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.tensors: dict[str, Floats] = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors
        }
        self.fields = reader.fields
        self.architecture = str(self.field("general.architecture"))
        self.n_layers = int(self.key("block_count"))
        self.n_heads = int(self.key("attention.head_count"))
        self.n_kv_heads = int(self.key("attention.head_count_kv", self.n_heads))
        n_embd = self.tensors["token_embd.weight"].shape[1]
        self.head_dim = int(self.key("attention.key_length", n_embd // self.n_heads))
        self.rope_dims = int(self.key("rope.dimension_count", self.head_dim))
        self.rope_base = float(self.key("rope.freq_base", 10000.0))
        rms_eps = self.key("attention.layer_norm_rms_epsilon", 1e-5)
        self.norm_eps = float(self.key("attention.layer_norm_epsilon", rms_eps))
        self.window = int(self.key("attention.sliding_window", 0))
        self.n_ctx_train = int(self.key("context_length"))
        self.n_ctx_orig = int(self.key("rope.scaling.original_context_length", self.n_ctx_train))
        self.inputs: dict[str, Floats] = {}
        self.chosen_experts: dict[str, npt.NDArray[np.int64]] = {}
        self.routing_margins: Floats = np.empty(0, np.float32)

    def field(self, name: str, default: Any = None) -> Any:
        """Return a metadata value."""
        return self.fields[name].contents() if name in self.fields else default

    def key(self, name: str, default: Any = None) -> Any:
        """Return a metadata value whose key begins with the architecture."""
        return self.field(f"{self.architecture}.{name}", default)

    def logits(self, tokens: list[int], *, long_rope: bool | None = None) -> Floats:
        """Return the logits at each position, float32 [n_tokens, n_vocab]; long_rope: as in `hidden_states`."""
        output = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        return self.linear(self.hidden_states(tokens, long_rope=long_rope), output)

    def hidden_states(self, tokens: list[int], *, long_rope: bool | None = None) -> Floats:
        """Return the hidden states after the final norm, float32 [n_tokens, n_embd].

        long_rope: use LongRoPE's long factors; None: if there are more than n_ctx_orig tokens, as transformers does.
        """
        if long_rope is None:
            long_rope = len(tokens) > self.n_ctx_orig
        x = self.tensors["token_embd.weight"][tokens]
        self.routing_margins = np.full(len(tokens), np.inf, np.float32)
        cos, sin = self.rope_cos_sin(len(tokens), long_rope)
        is_parallel = self.architecture == "phi2"
        for layer in range(self.n_layers):
            block = f"blk.{layer}."
            normed = self.norm(x, block + "attn_norm")
            q, k, v = self.qkv(block, normed)
            attended = self.attention(self.apply_rope(q, cos, sin), self.apply_rope(k, cos, sin), v)
            x = x + self.linear(attended, block + "attn_output.weight")
            x = x + self.feed_forward(block, normed if is_parallel else self.norm(x, block + "ffn_norm"))
        return self.norm(x, "output_norm")

    def norm(self, x: Floats, name: str) -> Floats:
        """Return LayerNorm of x if the norm has a bias, RMSNorm otherwise; computed in float64."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        exact = x.astype(np.float64)
        if bias is None:
            return (x / np.sqrt((exact**2).mean(-1, keepdims=True) + self.norm_eps) * weight).astype(np.float32)
        centred = exact - exact.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return (centred / np.sqrt(variance + self.norm_eps) * weight + bias).astype(np.float32)

    def linear(self, x: Floats, name: str) -> Floats:
        """Return x [n_tokens, n_cols] times the transposed matrix, plus its bias if there is one; record x."""
        self.inputs[name] = x
        bias = "output.bias" if name == "token_embd.weight" else name.replace(".weight", ".bias")
        return x @ self.tensors[name].T + self.tensors.get(bias, np.float32(0))

    def qkv(self, block: str, x: Floats) -> list[Floats]:
        """Return q, k and v, each [n_tokens, heads, head_dim]."""
        counts = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
        if block + "attn_qkv.weight" in self.tensors:
            ends = np.cumsum(counts)[:-1] * self.head_dim
            parts = np.split(self.linear(x, block + "attn_qkv.weight"), ends, axis=1)
        else:
            parts = [self.linear(x, f"{block}attn_{letter}.weight") for letter in "qkv"]
        return [part.reshape(len(x), n, self.head_dim) for part, n in zip(parts, counts, strict=True)]

    def rope_cos_sin(self, n_tokens: int, long_rope: bool) -> tuple[Floats, Floats]:
        """Return cos and sin of the rotation angles, each [n_tokens, rope_dims / 2]."""
        exponents = np.arange(0, self.rope_dims, 2, dtype=np.float32) / self.rope_dims
        inv_freq = 1.0 / self.rope_base**exponents
        attn_factor = 1.0
        factors = "rope_factors_long.weight" if long_rope else "rope_factors_short.weight"
        if factors in self.tensors:
            inv_freq = inv_freq / self.tensors[factors]
            formula = np.sqrt(1 + np.log(self.n_ctx_train / self.n_ctx_orig) / np.log(self.n_ctx_orig))
            attn_factor = float(self.key("rope.scaling.attn_factor", formula))
        angles = np.arange(n_tokens, dtype=np.float32)[:, None] * inv_freq.astype(np.float32)
        return (np.cos(angles) * attn_factor).astype(np.float32), (np.sin(angles) * attn_factor).astype(np.float32)

    def apply_rope(self, x: Floats, cos: Floats, sin: Floats) -> Floats:
        """Rotate the first rope_dims elements of each head of x [n_tokens, heads, head_dim]."""
        half = self.rope_dims // 2
        if self.architecture == "llama":  # interleaved: 2 i with 2 i + 1
            first, second = np.arange(half) * 2, np.arange(half) * 2 + 1
        else:  # NeoX: i with i + half
            first, second = np.arange(half), np.arange(half) + half
        a, b = x[..., first], x[..., second]
        rotated = x.copy()
        rotated[..., first] = a * cos[:, None] - b * sin[:, None]
        rotated[..., second] = b * cos[:, None] + a * sin[:, None]
        return rotated

    def attention(self, q: Floats, k: Floats, v: Floats) -> Floats:
        """Return causal attention, within the sliding window if there is one, as [n_tokens, n_heads * head_dim]."""
        n_tokens = len(q)
        distance = np.arange(n_tokens)[:, None] - np.arange(n_tokens)[None]
        is_masked = distance < 0
        if 0 < self.window < self.n_ctx_train:
            is_masked |= distance >= self.window
        group_size = self.n_heads // self.n_kv_heads
        out = np.empty_like(q)
        for head in range(self.n_heads):
            scores = q[:, head] @ k[:, head // group_size].T / np.sqrt(self.head_dim)
            scores[is_masked] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head // group_size]
        return out.reshape(n_tokens, -1)

    def feed_forward(self, block: str, x: Floats) -> Floats:
        """Return the feed-forward output, [n_tokens, n_embd]: experts, GELU (phi2) or SwiGLU."""
        if block + "ffn_gate_inp.weight" in self.tensors:
            return self.mixture_of_experts(block, x)
        if self.architecture == "phi2":
            return self.linear(gelu(self.linear(x, block + "ffn_up.weight")), block + "ffn_down.weight")
        if self.architecture == "phi3":
            gate, up = np.split(self.linear(x, block + "ffn_up.weight"), 2, axis=1)
        else:
            gate, up = (self.linear(x, f"{block}ffn_{name}.weight") for name in ("gate", "up"))
        return self.linear(silu(gate) * up, block + "ffn_down.weight")

    def mixture_of_experts(self, block: str, x: Floats) -> Floats:
        """Return the weighted sum of the two experts that SparseMixer chooses for each token, [n_tokens, n_embd]."""
        router_scores = self.linear(x, block + "ffn_gate_inp.weight")
        gates, ups, downs = (self.tensors[f"{block}ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
        self.chosen_experts[block] = np.empty((len(x), EXPERTS_PER_TOKEN), np.int64)
        out = np.zeros_like(x)
        for t, scores in enumerate(router_scores):
            remaining = scores.copy()  # -inf for experts already chosen
            for k in range(EXPERTS_PER_TOKEN):
                best = int(remaining.argmax())
                distance = (scores[best] - scores) / np.maximum(np.abs(scores), scores[best])
                others = np.delete(distance, [best, *self.chosen_experts[block][t, :k]])
                margins = [self.routing_margins[t : t + 1], others, np.abs(others - JITTER_THRESHOLD)]
                self.routing_margins[t] = np.concatenate(margins).min()
                is_near = distance <= JITTER_THRESHOLD
                unnormalised = np.exp(np.where(is_near, remaining, -np.inf) - remaining[best])
                inner = silu(gates[best] @ x[t]) * (ups[best] @ x[t])
                out[t] += (downs[best] @ inner) / unnormalised.sum()
                self.chosen_experts[block][t, k] = best
                remaining[best] = -np.inf
        return out


def silu(x: Floats) -> Floats:
    """Return x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def gelu(x: Floats) -> Floats:
    """Return the tanh approximation of GELU."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi).astype(np.float32) * (x + np.float32(0.044715) * x**3)))
