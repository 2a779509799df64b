"""The rotary embedding in a config.json, with the older keys or those of transformers 5."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phi_c.errors import ModelFileError, UnsupportedModelError
from phi_c.model.config import ROPE_FREQS, ROPE_LONG, ROPE_SHORT

Floats = npt.NDArray[np.float32]
_KINDS = ("default", "linear", "llama3", "longrope")
_MAX = 1e30  # far above any setting and below the largest float32


@dataclass(frozen=True)
class Rope:
    """Settings of the rotary embedding."""

    kind: str  # one of _KINDS
    base: float
    dims: int  # leading elements of a head that are rotated
    n_ctx_orig: int | None  # original context of LongRoPE, positions; None for other kinds
    attn_factor: float  # multiplies cos and sin
    factor: float  # of linear scaling; 1.0 for other kinds
    tensors: dict[str, Floats]  # divisors of the frequencies [dims / 2], by GGUF tensor name


def read_rope(
    config: Mapping[str, Any], head_dim: int, n_ctx: int, default_partial: float | None, config_path: str
) -> Rope:
    """Return the settings in config.json.

    config: content of config.json.
    head_dim: elements per head.
    n_ctx: max_position_embeddings.
    default_partial: fraction of a head that is rotated if config.json does not specify it; None: it must be 1.
    config_path: path that error messages begin with.

    Raises ModelFileError for invalid values, UnsupportedModelError for an unknown rope_type. Formulas: transformers,
    modeling_rope_utils.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ModelFileError(f"{config_path}: rope_scaling is a {type(found).__name__}, expected an object")
    top_level_keys = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    settings = _Settings(
        {key: config[key] for key in top_level_keys if config.get(key) is not None} | found, config_path
    )
    kind = found.get("rope_type") or found.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # the name in Phi-3's first config.json
    if kind not in _KINDS:
        raise UnsupportedModelError(f"{config_path}: rope_type is {kind!r}, expected one of {', '.join(_KINDS)}")
    base = settings.number("rope_theta", 10000.0)
    partial = settings.number("partial_rotary_factor", default_partial or 1.0)
    if partial > 1 or (partial != 1 and default_partial is None):
        expected = "1" if default_partial is None else "at most 1"
        raise UnsupportedModelError(f"{config_path}: partial_rotary_factor is {partial}, expected {expected}")
    dims = int(head_dim * partial)
    n_ctx_orig = min(int(settings.number("original_max_position_embeddings", n_ctx)), 2**31 - 1)
    tensors: dict[str, Floats] = {}
    attn_factor = 1.0
    if kind == "longrope":
        for name, key in ((ROPE_LONG, "long_factor"), (ROPE_SHORT, "short_factor")):
            tensors[name] = settings.factors(key, dims)
        attn_factor = _attn_factor(settings, n_ctx, n_ctx_orig)
    elif kind == "llama3":
        tensors = {ROPE_FREQS: _llama3_divisors(settings, base, dims, n_ctx_orig)}
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
    """Keys of config.json that concern the rotary embedding."""

    values: Mapping[str, Any]
    config_path: str

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX:
            raise ModelFileError(f"{self.config_path}: {key} is {value!r:.60}, expected a positive number")
        return float(value)

    def factors(self, key: str, dims: int) -> Floats:
        value = self.values.get(key)
        numbers = [v for v in value if type(v) in (int, float) and 0 < v < _MAX] if isinstance(value, list) else []
        if len(numbers) != dims // 2 or numbers != value:
            raise ModelFileError(
                f"{self.config_path}: {key} has {len(numbers)} positive numbers, expected a list of {dims // 2}"
            )
        return np.array(value, np.float32)


def _attn_factor(settings: _Settings, n_ctx: int, n_ctx_orig: int) -> float:
    mscales = {settings.values.get("short_mscale"), settings.values.get("long_mscale")} - {None}
    if len(mscales) > 1:
        raise UnsupportedModelError(
            f"{settings.config_path}: short_mscale and long_mscale differ, expected the same value: GGUF has one key"
        )
    if mscales:  # Phi-3.5-MoE's factor differs from the formula's
        return settings.number("short_mscale" if "short_mscale" in settings.values else "long_mscale")
    if settings.values.get("attention_factor") is not None:
        return settings.number("attention_factor")
    factor = settings.number("factor") if settings.values.get("factor") is not None else n_ctx / max(n_ctx_orig, 1)
    return math.sqrt(1 + math.log(factor) / math.log(n_ctx_orig)) if factor > 1 and n_ctx_orig > 1 else 1.0


def _llama3_divisors(settings: _Settings, base: float, dims: int, n_ctx_orig: int) -> Floats:
    """Return the divisor of each frequency in Llama 3's scaling, float32 [dims / 2].

    It is 1 for short wavelengths and `factor` for long ones, with a linear transition of 1 / divisor between them.
    """
    factor, low, high = (settings.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise ModelFileError(
            f"{settings.config_path}: low_freq_factor is {low}, expected less than high_freq_factor ({high})"
        )
    wavelengths = 2 * math.pi * base ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    smooth = np.clip((n_ctx_orig / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)
