"""Errors beside those of ggml's own quantisers (libgguf): ours are never larger."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weights import MAKERS, QUANTISED, TYPES, Bytes, Floats, error_of, importance, make, quantized

from phi_c import _core
from phi_c.gguf.reader import GGUFFile


@pytest.fixture(scope="module")
def libgguf() -> Any:
    return pytest.importorskip("libgguf", reason="libgguf is not installed: pip install libgguf")


def theirs(libgguf: Any, name: str, rows: Floats, weights: Floats | None) -> Bytes:
    given = () if weights is None else (weights,)
    blocks: Bytes = libgguf.quantize_rows(rows, TYPES[name].type_id, *given)
    return blocks


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("distribution", MAKERS)
@pytest.mark.parametrize("name", QUANTISED)
def test_no_larger_than_ggml(libgguf: Any, name: str, distribution: str, weighed: bool) -> None:
    for seed in range(2):
        rows = make(distribution, seed=seed)
        weights = importance(seed=seed) if weighed else None
        ours = error_of(name, quantized(name, rows, weights), rows, weights)
        assert ours <= error_of(name, theirs(libgguf, name, rows, weights), rows, weights)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", QUANTISED)
def test_no_larger_than_ggml_on_real_weights(libgguf: Any, smollm2_path: Path, name: str, weighed: bool) -> None:
    """Rows of SmolLM2's embedding, attention and feed-forward, made 256 wide."""
    ours = ggml = 0.0
    with GGUFFile(smollm2_path) as file:
        for tensor in ("token_embd", "blk.0.attn_q", "blk.9.attn_output", "blk.14.ffn_up", "blk.29.ffn_down"):
            info = file.tensors[f"{tensor}.weight"]
            n_cols = info.shape[-1]
            raw = file.data(info.name).reshape(info.shape[0], -1)[:128]
            rows = _core.dequantize(info.type_id, raw.reshape(-1), len(raw) * n_cols).reshape(-1, n_cols)
            rows = np.ascontiguousarray(rows[:, : n_cols // 256 * 256])
            weights = importance(rows.shape[1]) if weighed else None
            ours += error_of(name, quantized(name, rows, weights), rows, weights)
            ggml += error_of(name, theirs(libgguf, name, rows, weights), rows, weights)
    assert 0 < ours <= ggml
