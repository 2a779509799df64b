"""Checks of `load` options and their defaults. Every error is one line that names the option and what was expected."""

import os

from phi_c import machine
from phi_c._core import PAGE_TOKENS, cpu_features, kv_page_bytes, tiers
from phi_c.arguments import check_integer, is_integer
from phi_c.engine.scheduler import max_resident_pages, pages_for
from phi_c.errors import ContextLengthError, MemoryLimitError, OptionError
from phi_c.model.config import ModelConfig

DEFAULT_N_CTX = 4096
ROPES = ("auto", "long", "short")
TIER_VARIABLE = "PHI_C_ISA"
# CPU features that a tier needs besides avx512. The system may still refuse AMX to the process (csrc/dispatch.c).
_TILE_FEATURES = {"amx": {"amx_tile", "amx_int8"}, "amxbf16": {"amx_tile", "amx_bf16", "avx512bf16"}}
_MAX_KV_CACHE_TOKENS = 1 << 26
KV_MEMORY_SHARE = 0.25  # of the memory that is available beside the weights, for the default KV cache
_MAX_DEFAULT_CONTEXTS = 64  # in the default KV cache


def check_count(name: str, value: int | None, minimum: int, maximum: int | None) -> int | None:
    """Return a value as int or None. Raises OptionError unless it is None or an integer in the range."""
    return None if value is None else check_integer(name, value, minimum, maximum)


def check_fits(n_tokens: int, n_ctx: int, config: ModelConfig, what: str = "the prompt") -> None:
    """Raise ContextLengthError if an input of n_tokens is longer than the context."""
    if n_tokens > n_ctx:
        larger = f", or load the model with a larger n_ctx (at most {config.n_ctx_train})"
        raise ContextLengthError(
            f"{what} has {n_tokens} tokens, more than the context size of {n_ctx}: shorten it"
            + (larger if n_ctx < config.n_ctx_train else "")
        )


def choose_tier(tier: str | None) -> str | None:
    """Return the tier that the caller or PHI_C_ISA names; None: the best one.

    Raises OptionError for a tier that is unknown or not supported by this machine.
    """
    name = tier or os.environ.get(TIER_VARIABLE) or None
    if name is not None and name not in tiers():
        option = "tier" if tier else TIER_VARIABLE
        reason = _refusal(name)
        raise OptionError(f"{option} is {name!r}{reason}, expected one that this machine runs: {', '.join(tiers())}")
    return name


def _refusal(name: str) -> str:
    """Return why the system, rather than the CPU or the build, does not support a tier; "" if that is not the cause."""
    features = _TILE_FEATURES.get(name)
    is_built = name in tiers(known=True) and "avx512" in tiers()
    if features is None or not is_built or not features <= set(cpu_features()):
        return ""
    return ", which needs AMX tiles that the system denies this process"


def choose_n_ctx(n_ctx: int | None, config: ModelConfig) -> int:
    """Return the context size in tokens. Raises OptionError for one larger than the model's own."""
    if n_ctx is None:
        return min(config.n_ctx_train, DEFAULT_N_CTX)
    if not is_integer(n_ctx) or not 0 <= n_ctx <= config.n_ctx_train:
        raise OptionError(
            f"n_ctx is {n_ctx!r}, expected 1 to {config.n_ctx_train}, or 0 for the model's own context size"
        )
    return int(n_ctx) or config.n_ctx_train


def default_kv_cache_tokens(n_ctx: int, page_bytes: int, weight_bytes: int) -> int:
    """Return the default KV cache capacity in tokens: KV_MEMORY_SHARE of the available memory, at least one context."""
    n_pages = int(max(machine.memory_available() - weight_bytes, 0) * KV_MEMORY_SHARE) // page_bytes
    return max(n_ctx, min(n_pages * PAGE_TOKENS, _MAX_DEFAULT_CONTEXTS * n_ctx))


def choose_kv_cache_tokens(
    kv_cache_tokens: int | None, n_ctx: int, n_batch: int, config: ModelConfig, kv_type: str, weight_bytes: int
) -> int:
    """Return the KV cache capacity in tokens. Raises OptionError if one sequence of n_ctx tokens does not fit it."""
    minimum = max_resident_pages(n_ctx, n_batch, config.window) * PAGE_TOKENS
    kv_cache_tokens = check_count("kv_cache_tokens", kv_cache_tokens, 1, _MAX_KV_CACHE_TOKENS)
    if kv_cache_tokens is not None and pages_for(kv_cache_tokens) * PAGE_TOKENS < minimum:
        raise OptionError(
            f"kv_cache_tokens is {kv_cache_tokens}, expected at least {minimum}: "
            f"the capacity that one sequence of n_ctx = {n_ctx} tokens needs"
        )
    if kv_cache_tokens is None:
        return default_kv_cache_tokens(n_ctx, kv_page_bytes(config, kv_type), weight_bytes)
    return kv_cache_tokens


def choose_n_ctx_orig(rope: str, config: ModelConfig) -> int | None:
    """Return the largest sequence length in tokens that uses LongRoPE's short factors; None: all lengths do.

    Raises OptionError for an unknown rope, or one other than "auto" for a model without LongRoPE.
    """
    if rope not in ROPES:
        raise OptionError(f"rope is {rope!r}, expected one of {', '.join(ROPES)}")
    if not config.long_rope:
        if rope != "auto":
            raise OptionError(f"rope is {rope!r}, expected auto: {config.name} has no LongRoPE factors to choose from")
        return None
    return {"auto": config.n_ctx_orig, "long": 0, "short": None}[rope]


def check_memory(config: ModelConfig, kv_cache_tokens: int, kv_type: str, weight_bytes: int) -> None:
    """Raise MemoryLimitError if weights and KV cache do not fit the free memory."""
    page_bytes = kv_page_bytes(config, kv_type)
    kv_bytes = pages_for(kv_cache_tokens) * page_bytes
    available = machine.memory_available()
    if kv_bytes + weight_bytes > available:
        n_ctx = max(available - weight_bytes, 0) // page_bytes * PAGE_TOKENS
        raise MemoryLimitError(
            f"the weights need {weight_bytes / 2**30:.1f} GiB and a KV cache of {kv_cache_tokens} tokens "
            f"{kv_bytes / 2**30:.1f} GiB, but only {available / 2**30:.1f} GiB are free: "
            + (f"reduce n_ctx to at most {n_ctx}" if n_ctx else "use a smaller model")
        )
