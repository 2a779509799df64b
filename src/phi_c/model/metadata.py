"""Typed access to a GGUF file's metadata, and the keys that describe models phi-c does not run.

Key names follow the GGUF specification. Every error message names the file and the key.
"""

import numpy as np

from phi_c.errors import ModelFileError, UnsupportedModelError
from phi_c.gguf.reader import GGUFFile, short
from phi_c.model.architectures import ARCHITECTURES, Architecture

MAX_INT = 2**31 - 1  # the kernels use 32-bit positions and row numbers

# Keys of computations that phi-c does not implement, with the value that disables each.
_DISABLED_VALUES: dict[str, bool | float] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "use_parallel_residual": False,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "residual_scale": 1,
    "embedding_scale": 1,
    "swin_norm": False,
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.q_lora_rank": 0,
    "attention.kv_lora_rank": 0,
    "attention.temperature_length": 0,
    "attention.shared_kv_layers": 0,
}
_EXPERT_KEYS = ("expert_count", "expert_used_count")
# Keys that no value disables.
_UNSUPPORTED_KEYS = ("attention.scale", "attention.sliding_window_pattern", "rope.dimension_sections")


def read_architecture(file: GGUFFile) -> Architecture:
    """Return the row of `general.architecture`; raises ModelFileError, UnsupportedModelError."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        found = "no such key" if name is None else short(name)
        raise ModelFileError(f"{file.path}: general.architecture: expected a string, found {found}")
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise UnsupportedModelError(
            f"{file.path}: the architecture {short(name)} is not supported, expected one of {', '.join(ARCHITECTURES)}"
        )
    return architecture


def refuse_unsupported_keys(file: GGUFFile, architecture: Architecture) -> None:
    """Raise UnsupportedModelError for a key that enables a computation phi-c does not implement."""
    for name, disabled in _DISABLED_VALUES.items():
        if architecture.has_experts and name in _EXPERT_KEYS:
            continue
        if architecture.is_parallel and name == "use_parallel_residual":
            continue
        value = file.metadata.get(f"{architecture.name}.{name}", disabled)
        if not isinstance(value, bool | int | float) or value != disabled:
            raise UnsupportedModelError(
                f"{file.path}: {architecture.name}.{name} is {short(value)}, expected {disabled} or no such key: "
                "phi-c does not implement it"
            )
    for name in _UNSUPPORTED_KEYS:
        if f"{architecture.name}.{name}" in file.metadata:
            raise UnsupportedModelError(
                f"{file.path}: the metadata key {architecture.name}.{name} is not supported, expected a file without it"
            )


def read_integer(file: GGUFFile, key: str, default: int | None = None, *, at_least: int = 1) -> int:
    """Return an integer, or the common value of an array with one integer per layer.

    default: value if the key is absent; None: the key is required.
    at_least: smallest value allowed; the largest is MAX_INT.

    Raises ModelFileError, or UnsupportedModelError for an array of different values.
    """
    value = file.metadata.get(key)
    if value is None:
        if default is None:
            raise ModelFileError(f"{file.path}: the metadata key {key} is missing")
        return default
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size > 0:
        if (value != value[0]).any():
            raise UnsupportedModelError(
                f"{file.path}: {key} differs between layers ({value.min()} to {value.max()}), "
                "expected the same value for all layers"
            )
        value = int(value[0])
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= MAX_INT:
        raise ModelFileError(f"{file.path}: {key} is {short(value)}, expected an integer from {at_least} to {MAX_INT}")
    return value


def read_number(file: GGUFFile, key: str, low: float, high: float, default: float | None = None) -> float:
    """Return a number from low to high; raises ModelFileError, also if the key is absent and has no default."""
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ModelFileError(f"{file.path}: {key} is {short(value)}, expected a number from {low:g} to {high:g}")
    return float(value)


def read_string(file: GGUFFile, key: str, default: str) -> str:
    """Return a string, or the default if the key is absent; raises ModelFileError for another type."""
    value = file.metadata.get(key, default)
    if not isinstance(value, str):
        raise ModelFileError(f"{file.path}: {key} is {short(value)}, expected a string")
    return value
