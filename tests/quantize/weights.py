"""Rows of weights from several distributions, and quantisation errors."""

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

import gguf
from phi_c import _core

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

TYPES = {kind.name: kind for kind in _core.TENSOR_TYPES.values()}
QUANTISED = [kind.name for kind in TYPES.values() if kind.quantised_activations]
LEGACY = [name for name in QUANTISED if not name.endswith("_K")]
K_QUANTS = [name for name in QUANTISED if name.endswith("_K")]
N_ROWS, N_COLS = 32, 2048


def _outliers(rng: np.random.Generator) -> Floats:
    rows = rng.normal(size=(N_ROWS, N_COLS))
    rows[:, rng.choice(N_COLS, 16, replace=False)] *= 30
    return rows.astype(np.float32)


def _mixed_magnitudes(rng: np.random.Generator) -> Floats:
    magnitudes = (10.0 ** rng.uniform(-4, 1, (N_ROWS, N_COLS // 32))).repeat(32, 1)
    return (rng.normal(size=(N_ROWS, N_COLS)) * magnitudes).astype(np.float32)


def _gaussian(rng: np.random.Generator, scale: float = 1.0, offset: float = 0.0) -> Floats:
    return (rng.normal(size=(N_ROWS, N_COLS)) * scale + offset).astype(np.float32)


def _constant(rng: np.random.Generator) -> Floats:
    return np.repeat(np.linspace(-0.7, 0.7, N_ROWS, dtype=np.float32)[:, None], N_COLS, 1)


DISTRIBUTIONS = {
    "gaussian": _gaussian,
    "heavy tails": lambda rng: (rng.standard_t(2, (N_ROWS, N_COLS)) * 0.02).astype(np.float32),
    "outlier channels": _outliers,
    "blocks of all magnitudes": _mixed_magnitudes,
    "mostly zeros": lambda rng: _gaussian(rng) * (rng.random((N_ROWS, N_COLS)) < 0.05),
    "constant": _constant,
    "offset 1": lambda rng: _gaussian(rng, 0.01, 1.0),
    "offset -1": lambda rng: _gaussian(rng, 0.01, -1.0),
    "tiny": lambda rng: _gaussian(rng, 1e-6),
    "below the smallest float16": lambda rng: _gaussian(rng, 3e-8),
    "large": lambda rng: _gaussian(rng, 1e4),
    "zero": lambda rng: np.zeros((N_ROWS, N_COLS), np.float32),
}


def make(distribution: str, *, seed: int = 0) -> Floats:
    """Return rows, float32 [N_ROWS, N_COLS]. distribution: a key of DISTRIBUTIONS."""
    return np.ascontiguousarray(DISTRIBUTIONS[distribution](np.random.default_rng(seed)), np.float32)


def importance(n_cols: int = N_COLS, *, seed: int = 0) -> Floats:
    """Return mean squares of activations, log-normal as in real models: some are 1000 times as large as others."""
    return np.random.default_rng(seed).lognormal(0, 2, n_cols).astype(np.float32)


def quantized(name: str, rows: Floats, weights: Floats | None = None, n_threads: int = 1) -> Bytes:
    """Return the blocks of phi-c's quantiser: uint8 [n_rows, row_bytes]."""
    return _core.quantize_rows(TYPES[name].type_id, rows, weights, n_threads)


def values_of(name: str, blocks: Bytes) -> Floats:
    """Dequantise blocks with the gguf package."""
    return gguf.quants.dequantize(blocks, GGMLQuantizationType[name])


def error_of(name: str, blocks: Bytes, rows: Floats, weights: Floats | None = None) -> float:
    """Return the sum of squared errors, each multiplied by the weight of its column."""
    squares = (rows.astype(np.float64) - values_of(name, blocks)) ** 2
    return float(squares.sum() if weights is None else (squares * weights).sum())
