"""Rotary embedding as a config.json describes it, in the older keys and in those of transformers 5."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phi_c.errors import ModelFileError, UnsupportedModelError

Floats = npt.NDArray[np.float32]
_KINDS = ("default", "linear", "llama3", "longrope")
_MAX = 1e30  # far beyond any setting, and float32 still has it


@dataclass(frozen=True)
class Rope:
    """kind: one of `_KINDS`; n_ctx_orig: positions up to which LongRoPE's short factors hold."""

    kind: str
    base: float
    dims: int  # leading elements of a head that turn
    n_ctx_orig: int | None
    attn_factor: float  # multiplies cos and sin
    factor: float  # of linear scaling
    tensors: dict[str, Floats]  # what divides the frequencies, by the GGUF file's names


def read_rope(config: Mapping[str, Any], head_dim: int, n_ctx: int, default_partial: float | None, where: str) -> Rope:
    """Return the embedding's settings; raises ModelFileError, UnsupportedModelError for a kind of scaling unknown here.

    default_partial: share of a head that turns where the file does not say; None: it is 1. where: begins the messages.

    Formulas: transformers, modeling_rope_utils.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ModelFileError(f"{where}: rope_scaling is a {type(found).__name__}, expected an object")
    top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    settings = _Settings({key: config[key] for key in top if config.get(key) is not None} | found, where)
    kind = found.get("rope_type") or found.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # its name in Phi-3's first config.json
    if kind not in _KINDS:
        raise UnsupportedModelError(f"{where}: the rotary scaling {kind!r} has no place in a GGUF file of this kind")
    base = settings.number("rope_theta", 10000.0)
    partial = settings.number("partial_rotary_factor", default_partial or 1.0)
    if partial > 1 or (partial != 1 and default_partial is None):
        raise UnsupportedModelError(f"{where}: partial_rotary_factor is {partial}, expected 1 for such a model")
    dims = int(head_dim * partial)
    n_ctx_orig = min(int(settings.number("original_max_position_embeddings", n_ctx)), 2**31 - 1)
    tensors: dict[str, Floats] = {}
    attn_factor = 1.0
    if kind == "longrope":
        for name in ("long", "short"):
            tensors[f"rope_factors_{name}.weight"] = settings.factors(f"{name}_factor", dims)
        attn_factor = _attn_factor(settings, n_ctx, n_ctx_orig)
    elif kind == "llama3":
        tensors = {"rope_freqs.weight": _llama3_divisors(settings, base, dims, n_ctx_orig)}
    return Rope(
        kind=kind,
        base=base,
        dims=dims,
        n_ctx_orig=n_ctx_orig if kind == "longrope" else None,
        attn_factor=attn_factor,
        factor=settings.number("factor") if kind == "linear" else 1.0,
        tensors=tensors,
    )


@dataclass(frozen=True)
class _Settings:
    values: Mapping[str, Any]
    where: str

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX:
            raise ModelFileError(f"{self.where}: {key} is {value!r:.60}, expected a positive number")
        return float(value)

    def factors(self, key: str, dims: int) -> Floats:
        value = self.values.get(key)
        numbers = [v for v in value if type(v) in (int, float) and 0 < v < _MAX] if isinstance(value, list) else []
        if len(numbers) != dims // 2 or numbers != value:
            raise ModelFileError(f"{self.where}: {key} has {len(numbers)} positive numbers, expected {dims // 2}")
        return np.array(value, np.float32)


def _attn_factor(settings: _Settings, n_ctx: int, n_ctx_orig: int) -> float:
    mscales = {settings.values.get("short_mscale"), settings.values.get("long_mscale")} - {None}
    if len(mscales) > 1:
        raise UnsupportedModelError(f"{settings.where}: short_mscale and long_mscale differ, GGUF has one for both")
    if mscales:  # Phi-3.5-MoE's own, which is not what the formula gives
        return settings.number("short_mscale" if "short_mscale" in settings.values else "long_mscale")
    if settings.values.get("attention_factor") is not None:
        return settings.number("attention_factor")
    factor = settings.number("factor") if settings.values.get("factor") is not None else n_ctx / max(n_ctx_orig, 1)
    return math.sqrt(1 + math.log(factor) / math.log(n_ctx_orig)) if factor > 1 and n_ctx_orig > 1 else 1.0


def _llama3_divisors(settings: _Settings, base: float, dims: int, n_ctx_orig: int) -> Floats:
    """Return what Llama 3 divides each frequency by: 1 for short waves, `factor` for long ones, between them else."""
    factor, low, high = (settings.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise ModelFileError(f"{settings.where}: low_freq_factor is {low}, expected less than high_freq_factor, {high}")
    wave_lengths = 2 * math.pi * base ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    share = np.clip((n_ctx_orig / wave_lengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - share) / factor + share), np.float32)
