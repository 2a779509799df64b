"""Quantisation errors compared with ggml's quantisers (libgguf): ours are never larger.

Run as a script, this prints the table of docs/quantize.md.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weights import DISTRIBUTIONS, QUANTISED, TYPES, Bytes, Floats, error_of, importance, make, quantized

from phi_c import _core
from phi_c.gguf.reader import GGUFFile


@pytest.fixture(scope="module")
def libgguf() -> Any:
    return pytest.importorskip("libgguf", reason="libgguf is not installed: pip install libgguf")


def ggml_blocks(libgguf: Any, name: str, rows: Floats, weights: Floats | None) -> Bytes:
    arguments = () if weights is None else (weights,)
    blocks: Bytes = libgguf.quantize_rows(rows, TYPES[name].type_id, *arguments)
    return blocks


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", QUANTISED)
def test_errors_are_no_larger_than_those_of_ggml(libgguf: Any, name: str, distribution: str, weighted: bool) -> None:
    for seed in range(2):
        rows = make(distribution, seed=seed)
        weights = importance(seed=seed) if weighted else None
        ours = error_of(name, quantized(name, rows, weights), rows, weights)
        assert ours <= error_of(name, ggml_blocks(libgguf, name, rows, weights), rows, weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", QUANTISED)
def test_errors_on_real_weights_are_no_larger_than_those_of_ggml(
    libgguf: Any, smollm2_path: Path, name: str, weighted: bool
) -> None:
    """Rows of SmolLM2's embedding, attention and feed-forward, truncated to a multiple of 256 columns."""
    ours = ggml = 0.0
    with GGUFFile(smollm2_path) as file:
        for tensor in ("token_embd", "blk.0.attn_q", "blk.9.attn_output", "blk.14.ffn_up", "blk.29.ffn_down"):
            info = file.tensors[f"{tensor}.weight"]
            n_cols = info.shape[-1]
            raw = file.data(info.name).reshape(info.shape[0], -1)[:128]
            rows = _core.dequantize(info.type_id, raw.reshape(-1), len(raw) * n_cols).reshape(-1, n_cols)
            rows = np.ascontiguousarray(rows[:, : n_cols // 256 * 256])
            weights = importance(rows.shape[1]) if weighted else None
            ours += error_of(name, quantized(name, rows, weights), rows, weights)
            ggml += error_of(name, ggml_blocks(libgguf, name, rows, weights), rows, weights)
    assert 0 < ours <= ggml


def print_table() -> None:
    """Print the error as a share of ggml's, summed over six random matrices."""
    libgguf: Any = importlib.import_module("libgguf")
    columns = [(d, w) for d in ("gaussian", "heavy tails", "outlier channels") for w in (False, True)]
    print("| type |", " | ".join(d + ", weighted" * w for d, w in columns), "|")
    for name in ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        shares = [error_share(libgguf, name, distribution, weighted) for distribution, weighted in columns]
        print(f"| {name} |", " | ".join(f"{share:.2f}" for share in shares), "|")


def error_share(libgguf: Any, name: str, distribution: str, weighted: bool) -> float:
    ours = ggml = 0.0
    for seed in range(6):
        rows = make(distribution, seed=seed)
        weights = importance(seed=seed) if weighted else None
        ours += error_of(name, quantized(name, rows, weights), rows, weights)
        ggml += error_of(name, ggml_blocks(libgguf, name, rows, weights), rows, weights)
    return ours / ggml


if __name__ == "__main__":
    print_table()
