"""Options of `load`, checked and chosen: one line says what was expected."""

import os

from phi_c import machine
from phi_c._core import PAGE_TOKENS, cpu_features, kv_page_bytes, tiers
from phi_c.engine.scheduler import pages_at_once, pages_for
from phi_c.errors import MemoryLimitError, OptionError
from phi_c.model.config import ModelConfig

DEFAULT_N_CTX = 4096
ROPES = ("auto", "long", "short")
TIER_VARIABLE = "PHI_C_ISA"
# What tiers need of the CPU, besides avx512, whose use the system may yet refuse (csrc/dispatch.c).
_TILES = {"amx": {"amx_tile", "amx_int8"}, "amxbf16": {"amx_tile", "amx_bf16", "avx512bf16"}}
_MOST_CACHE = 1 << 26


def check_count(name: str, value: int | None, least: int, most: int | None) -> None:
    """Raise OptionError for a value, unless it is None, that is no integer within limits."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise OptionError(f"{name} is {value!r}, expected an integer {limits}")


def choose_tier(tier: str | None) -> str | None:
    """Return the tier asked for, by the caller or PHI_C_ISA; None: the best. Raises OptionError for one not there."""
    name = tier or os.environ.get(TIER_VARIABLE) or None
    if name is not None and name not in tiers():
        where = "tier" if tier else TIER_VARIABLE
        raise OptionError(f"{where} is {name!r}{_why(name)}, expected one that this machine runs: {', '.join(tiers())}")
    return name


def _why(name: str) -> str:
    """Return the reason why a tier is not there, where it is not the CPU that lacks it."""
    needed = _TILES.get(name)
    if needed is None or name not in tiers(known=True) or "avx512" not in tiers() or not needed <= set(cpu_features()):
        return ""
    return ", for which the system refuses this process AMX tiles"


def choose_n_ctx(n_ctx: int | None, config: ModelConfig) -> int:
    """Return the context in tokens; raises OptionError for one beyond the model's own."""
    if n_ctx is None:
        return min(config.n_ctx_train, DEFAULT_N_CTX)
    if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or not 0 <= n_ctx <= config.n_ctx_train:
        raise OptionError(f"n_ctx is {n_ctx!r}, expected 1 to {config.n_ctx_train}, the model's own, or 0 for that")
    return n_ctx or config.n_ctx_train


def choose_kv_cache_tokens(kv_cache_tokens: int | None, n_ctx: int, n_batch: int, config: ModelConfig) -> int:
    """Return the positions that the cache holds; raises OptionError for fewer than one text of n_ctx needs at once."""
    least = pages_at_once(n_ctx, n_batch, config.window) * PAGE_TOKENS
    check_count("kv_cache_tokens", kv_cache_tokens, 1, _MOST_CACHE)
    if kv_cache_tokens is not None and pages_for(kv_cache_tokens) * PAGE_TOKENS < least:
        raise OptionError(
            f"kv_cache_tokens is {kv_cache_tokens}, expected at least {least}: what one text of n_ctx {n_ctx} needs"
        )
    return n_ctx if kv_cache_tokens is None else kv_cache_tokens


def choose_n_ctx_orig(rope: str, config: ModelConfig) -> int | None:
    """Return the positions up to which LongRoPE's short factors hold, None: always. Raises OptionError."""
    if rope not in ROPES:
        raise OptionError(f"rope is {rope!r}, expected one of {', '.join(ROPES)}")
    if not config.long_rope:
        if rope != "auto":
            raise OptionError(f"rope is {rope!r}, expected auto: {config.name} has no LongRoPE factors to choose from")
        return None
    return {"auto": config.n_ctx_orig, "long": 0, "short": None}[rope]


def check_memory(config: ModelConfig, kv_cache_tokens: int, kv_type: str, weight_bytes: int) -> None:
    """Raise MemoryLimitError when weights and KV cache do not fit the memory that is free."""
    page_bytes = kv_page_bytes(config, kv_type)
    kv_bytes = pages_for(kv_cache_tokens) * page_bytes
    available = machine.memory_available()
    if kv_bytes + weight_bytes > available:
        fits = max(available - weight_bytes, 0) // page_bytes * PAGE_TOKENS
        raise MemoryLimitError(
            f"the weights take {weight_bytes / 2**30:.1f} GiB and a context of {kv_cache_tokens} {kv_bytes / 2**30:.1f} GiB, "
            f"{available / 2**30:.1f} GiB are free: "
            + (f"n_ctx of at most {fits} fits" if fits else "this model does not fit")
        )
