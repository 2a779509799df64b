"""An independent forward pass in NumPy: float32 weights from the gguf package, one position after the other.

Written from transformers' modeling_phi3.py, modeling_llama.py, modeling_phi.py and modeling_phimoe.py; shares no code
with phi_c.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gguf

Floats = npt.NDArray[np.float32]


class Reference:
    """A model in float32; `logits` gives float32 [n_tokens, n_vocab], `hidden_states` [n_tokens, n_embd]."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.inputs: dict[str, Floats] = {}  # of each matrix in the last call of `logits`: [n_tokens, n_cols]
        # Of models with experts, in the last call of `logits`: how far each token's routing was from another one, as a
        # share of the scores.
        self.margins: Floats = np.empty(0, np.float32)
        self.chosen: dict[str, npt.NDArray[np.int64]] = {}  # of each layer with experts, likewise: [n_tokens, 2]
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
        self.base = float(self.key("rope.freq_base", 10000.0))
        rms_eps = self.key("attention.layer_norm_rms_epsilon", 1e-5)
        self.eps = float(self.key("attention.layer_norm_epsilon", rms_eps))
        self.window = int(self.key("attention.sliding_window", 0))
        self.n_ctx = int(self.key("context_length"))
        self.n_ctx_orig = int(self.key("rope.scaling.original_context_length", self.n_ctx))

    def field(self, name: str, default: Any = None) -> Any:
        return self.fields[name].contents() if name in self.fields else default

    def key(self, name: str, default: Any = None) -> Any:
        return self.field(f"{self.architecture}.{name}", default)

    def rotation(self, n_tokens: int, long_rope: bool) -> tuple[Floats, Floats]:
        """Return cos and sin, [n_tokens, rope_dims / 2]."""
        exponent = np.arange(0, self.rope_dims, 2, dtype=np.float32) / self.rope_dims
        frequencies = 1.0 / self.base**exponent
        scale = 1.0
        name = "rope_factors_long.weight" if long_rope else "rope_factors_short.weight"
        if name in self.tensors:
            frequencies = frequencies / self.tensors[name]
            formula = np.sqrt(1 + np.log(self.n_ctx / self.n_ctx_orig) / np.log(self.n_ctx_orig))
            scale = float(self.key("rope.scaling.attn_factor", formula))
        angles = np.arange(n_tokens, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
        return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)

    def rotate(self, x: Floats, cos: Floats, sin: Floats) -> Floats:
        """Rotate heads [n_tokens, n_heads, head_dim]; what lies beyond rope_dims stays."""
        half = self.rope_dims // 2
        if self.architecture != "llama":
            first, second = np.arange(half), np.arange(half) + half
        else:
            first, second = np.arange(half) * 2, np.arange(half) * 2 + 1
        a, b = x[..., first], x[..., second]
        out = x.copy()
        out[..., first] = a * cos[:, None] - b * sin[:, None]
        out[..., second] = b * cos[:, None] + a * sin[:, None]
        return out

    def norm(self, x: Floats, name: str) -> Floats:
        """Return RMSNorm's, or, where there is a bias, LayerNorm's."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        exact = x.astype(np.float64)
        if bias is None:
            return (x / np.sqrt((exact**2).mean(-1, keepdims=True) + self.eps) * weight).astype(np.float32)
        apart = exact - exact.mean(-1, keepdims=True)
        return (apart / np.sqrt((apart**2).mean(-1, keepdims=True) + self.eps) * weight + bias).astype(np.float32)

    def product(self, x: Floats, name: str) -> Floats:
        """Return x [n_tokens, n_cols] times a matrix plus its bias if it has one, and remember x."""
        self.inputs[name] = x
        bias = "output.bias" if name == "token_embd.weight" else name.replace(".weight", ".bias")
        return x @ self.tensors[name].T + self.tensors.get(bias, np.float32(0))

    def projections(self, layer: int, x: Floats) -> list[Floats]:
        """Return q, k, v as [n_tokens, heads, head_dim]."""
        block = f"blk.{layer}."
        counts = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
        if block + "attn_qkv.weight" in self.tensors:
            ends = np.cumsum(counts)[:-1] * self.head_dim
            parts = np.split(self.product(x, block + "attn_qkv.weight"), ends, axis=1)
        else:
            parts = [self.product(x, f"{block}attn_{name}.weight") for name in "qkv"]
        return [part.reshape(len(x), n, self.head_dim) for part, n in zip(parts, counts, strict=True)]

    def attention(self, q: Floats, k: Floats, v: Floats) -> Floats:
        n = len(q)
        distance = np.arange(n)[:, None] - np.arange(n)[None]
        hidden = distance < 0
        if 0 < self.window < self.n_ctx:
            hidden |= distance >= self.window
        group = self.n_heads // self.n_kv_heads
        out = np.empty_like(q)
        for head in range(self.n_heads):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(self.head_dim)
            scores[hidden] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head // group]
        return out.reshape(n, -1)

    def experts(self, block: str, x: Floats) -> Floats:
        """Return the weighted sum of the two experts that SparseMixer chooses for each token."""
        scores = self.product(x, block + "ffn_gate_inp.weight")
        gates, ups, downs = (self.tensors[f"{block}ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
        self.chosen[block] = np.empty((len(x), 2), np.int64)
        out = np.zeros_like(x)
        for t, row in enumerate(scores):
            left = row.copy()
            for k in range(2):
                best = int(left.argmax())
                apart = (row[best] - row) / np.maximum(np.abs(row), row[best])
                others = np.delete(apart, [best, *self.chosen[block][t, :k]])
                self.margins[t] = np.concatenate([self.margins[t : t + 1], others, np.abs(others - 0.02)]).min()
                near = apart <= 0.02
                shares = np.exp(np.where(near, left, -np.inf) - left[best])
                gate, up = gates[best] @ x[t], ups[best] @ x[t]
                out[t] += (downs[best] @ (gate / (1 + np.exp(-gate)) * up)) / shares.sum()
                self.chosen[block][t, k] = best
                left[best] = -np.inf
        return out

    def feed_forward(self, layer: int, x: Floats) -> Floats:
        block = f"blk.{layer}."
        if block + "ffn_gate_inp.weight" in self.tensors:
            return self.experts(block, x)
        if self.architecture == "phi2":
            up = self.product(x, block + "ffn_up.weight")
            inner = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi).astype(np.float32) * (up + np.float32(0.044715) * up**3)))
            return self.product(inner, block + "ffn_down.weight")
        if self.architecture == "phi3":
            gate, up = np.split(self.product(x, block + "ffn_up.weight"), 2, axis=1)
        else:
            gate, up = (self.product(x, f"{block}ffn_{name}.weight") for name in ("gate", "up"))
        return self.product(gate / (1 + np.exp(-gate)) * up, block + "ffn_down.weight")

    def logits(self, tokens: list[int], *, long_rope: bool | None = None) -> Floats:
        """Return the logits after each token; long_rope None: as transformers decides for the whole text."""
        output = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        return self.product(self.hidden_states(tokens, long_rope=long_rope), output)

    def hidden_states(self, tokens: list[int], *, long_rope: bool | None = None) -> Floats:
        """Return each token's state after the final norm."""
        if long_rope is None:
            long_rope = len(tokens) > self.n_ctx_orig
        x = self.tensors["token_embd.weight"][tokens]
        self.margins = np.full(len(tokens), np.inf, np.float32)
        cos, sin = self.rotation(len(tokens), long_rope)
        for layer in range(self.n_layers):
            block = f"blk.{layer}."
            normed = self.norm(x, block + "attn_norm")
            q, k, v = self.projections(layer, normed)
            attended = self.attention(self.rotate(q, cos, sin), self.rotate(k, cos, sin), v)
            x = x + self.product(attended, block + "attn_output.weight")
            parallel = self.architecture == "phi2"
            x = x + self.feed_forward(layer, normed if parallel else self.norm(x, block + "ffn_norm"))
        return self.norm(x, "output_norm")
