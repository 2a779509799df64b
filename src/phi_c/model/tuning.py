"""Run-time tuning: settings that change the speed of a model on this machine, never its results.

The first load measures them (`_core.tune`) and stores a profile in `tuning/` of the cache folder; later loads use it. A
profile is a JSON file for one CPU, number of threads, tier and release of phi-c. It has the prefetch of each
tensor type measured so far, from any model, and, after `phi-c doctor --tune`, the other settings.

A profile that cannot be read or has other contents is measured again. One that cannot be written is not an error: the
model runs with what was measured.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi_c import machine
from phi_c._core import (
    BATCH_CLASSES,
    TENSOR_TYPES,
    Model,
    Prefetch,
    Tuning,
    cpu_features,
    default_tuning,
    set_tuning,
    tune,
)
from phi_c.errors import CacheError, OptionError
from phi_c.storage import atomic_write, cache_dir

VARIABLE = "PHI_C_TUNE"
MODES = ("off", "force")
BUDGET_SECONDS = 0.2
_FORMAT = 2  # of the file; incremented as well when kernels change so that other settings are the fastest
_FIELDS = ("max_task_rows", "tasks_per_thread", "spins")


@dataclass(frozen=True)
class Key:
    """What a profile was measured for."""

    cpu: str
    features: str  # of the CPU, since virtual machines give several CPU models one name
    n_threads: int
    tier: str
    version: str  # of phi-c

    @property
    def path(self) -> Path | None:
        """The profile's file; None if there is no cache folder."""
        try:
            folder = profile_folder()
        except (OSError, RuntimeError):  # RuntimeError: no home folder
            return None
        return folder / f"{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class Profile:
    """Measured settings; None: the default."""

    key: Key
    prefetch: dict[str, tuple[Prefetch, ...]]  # per type name, one for each of BATCH_CLASSES
    max_small_batch: dict[str, int] | None = None  # per type name
    max_task_rows: int | None = None
    tasks_per_thread: int | None = None
    spins: int | None = None

    def settings(self) -> Tuning:
        """Return the profile's settings, with defaults for what it lacks."""
        default = default_tuning()
        return Tuning(
            {**default.prefetch, **self.prefetch},
            {**default.max_small_batch, **(self.max_small_batch or {})},
            default.max_task_rows if self.max_task_rows is None else self.max_task_rows,
            default.tasks_per_thread if self.tasks_per_thread is None else self.tasks_per_thread,
            default.spins if self.spins is None else self.spins,
        )


def read_mode() -> str | None:
    """Return the value of PHI_C_TUNE; None: not set. Raises OptionError for another value than those of MODES."""
    mode = os.environ.get(VARIABLE) or None
    if mode is not None and mode not in MODES:
        raise OptionError(f"{VARIABLE} is {mode!r}, expected one of {', '.join(MODES)}")
    return mode


def tune_model(model: Model) -> str:
    """Apply the stored profile to a model, and measure and store the types that it lacks.

    A type is stored if the measurement of single tokens was clear, else the next load measures it again.

    Returns where the settings come from: "cache", "measured in 0.20 s" or "defaults (REASON)". Raises OptionError for
    PHI_C_TUNE.
    """
    mode = read_mode()
    if mode == "off":
        return f"defaults ({VARIABLE}=off)"
    if not model.packed_bytes:
        return "defaults (the weights are not packed)"
    profile = apply_stored(model)
    known = profile.prefetch
    if mode == "force":
        known = {}  # a class that the time does not suffice for has the default, not what was stored
        set_tuning(model, dataclasses.replace(profile, prefetch=known).settings())
    start = time.perf_counter()
    settings, results = tune(model, BUDGET_SECONDS, known)
    set_tuning(model, settings)
    if not results:
        return "cache"
    source = f"measured in {time.perf_counter() - start:.2f} s"
    clear = {result.type_name for result in results if result.n_tokens == 1 and result.is_clear}
    if unclear := sorted({result.type_name for result in results} - clear):
        source += f", again at the next load for {', '.join(unclear)}: unclear"
    measured = {name: settings.prefetch[name] for name in clear}
    is_stored = store(dataclasses.replace(profile, prefetch={**profile.prefetch, **measured}))
    return source if is_stored else f"{source}, not stored: the cache folder is not writable"


def apply_stored(model: Model) -> Profile:
    """Return the stored profile and apply it to the model; an empty profile if there is none that is valid."""
    key = key_of(model)
    path = key.path
    profile = load(path) if path is not None else None
    if profile is not None and profile.key == key:
        with contextlib.suppress(ValueError, TypeError, OverflowError):  # values out of range
            set_tuning(model, profile.settings())
            return profile
    return Profile(key, {})


def key_of(model: Model) -> Key:
    """Return the key of a model's profile on this machine."""
    return Key(machine.cpu_name(), ",".join(cpu_features()), model.n_threads, model.tier, _version())


def profile_folder() -> Path:
    """Return the folder of the profiles, which may not exist."""
    return cache_dir() / "tuning"


def load(path: Path) -> Profile | None:
    """Return the profile of a file; None if it cannot be read, or is corrupt, or has another format."""
    try:
        return _parse(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def load_all() -> Iterable[Profile]:
    """Yield the stored profiles of all keys; files that cannot be read are skipped."""
    with contextlib.suppress(OSError, RuntimeError):
        for path in sorted(profile_folder().glob("*.json")):
            profile = load(path)
            if profile is not None:
                yield profile


def store(profile: Profile) -> bool:
    """Write a profile in place of the one of the same key; return whether it could be written."""
    path = profile.key.path
    if path is None:
        return False
    try:
        with atomic_write(path, CacheError) as file:
            file.write(json.dumps(_document(profile), indent=1).encode())
    except CacheError:
        return False
    return True


def _parse(document: Any) -> Profile:
    """Return the profile of a JSON document. Raises ValueError, TypeError, KeyError or AttributeError for another."""
    if document["format"] != _FORMAT:
        raise ValueError("another format")
    names = {traits.name for traits in TENSOR_TYPES.values()}
    prefetch = {
        name: tuple(Prefetch(**by_class[str(n)]) for n in BATCH_CLASSES)
        for name, by_class in document["prefetch"].items()
    }
    small_batch = document.get("max_small_batch")
    fields = {name: document.get(name) for name in _FIELDS}
    distances = [n for by_class in prefetch.values() for each in by_class for n in each[:2]]
    numbers = [*distances, *(small_batch or {}).values(), *(n for n in fields.values() if n is not None)]
    if not names >= {*prefetch, *(small_batch or {})} or any(type(n) is not int for n in numbers):
        raise ValueError("an unknown tensor type or a value that is not an integer")
    return Profile(Key(**document["key"]), prefetch, small_batch, **fields)


def _document(profile: Profile) -> dict[str, Any]:
    document: dict[str, Any] = {
        "format": _FORMAT,
        "key": vars(profile.key),
        "prefetch": {
            name: {str(n): each._asdict() for n, each in zip(BATCH_CLASSES, by_class, strict=True)}
            for name, by_class in profile.prefetch.items()
        },
    }
    for name in ("max_small_batch", *_FIELDS):
        if getattr(profile, name) is not None:
            document[name] = getattr(profile, name)
    return document


def _version() -> str:
    try:
        return importlib.metadata.version("phi-c")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
