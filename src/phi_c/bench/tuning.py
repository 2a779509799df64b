"""Measures the settings of a model's forward passes at length, for `phi-c doctor --tune`.

Prefetch is measured by `_core.tune`. The other settings are measured by whole forward passes: of one token, of a batch
of 8, and of a prompt of 128 tokens. Two settings are compared in interleaved rounds, by the median of their ratios.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi_c import machine
from phi_c._core import (
    BATCH_CLASSES,
    MAX_SMALL_BATCH,
    PAGE_TOKENS,
    TENSOR_TYPES,
    KvCache,
    Matrix,
    Model,
    Prefetch,
    TuneResult,
    Tuning,
    forward,
    get_tuning,
    quantize_rows,
    set_tuning,
    tune,
)
from phi_c.errors import MemoryLimitError
from phi_c.model.config import ModelConfig
from phi_c.model.tuning import Profile
from phi_c.model.weights import FeedForward, LayerWeights, Norm, Weights

_PREFETCH_SECONDS = 10.0
_ROUNDS = {1: 9, 8: 7, 128: 3}  # by tokens of a pass; more than MAX_SMALL_BATCH are a prompt
_SMALL_BATCHES = (16, 12, 8, 6)
_SMALL_BATCH_ROUNDS = 7
_MIN_GAIN = 0.015
# Fields of Tuning, and the values that are compared with the one in use.
_FIELDS = {"max_task_rows": (32, 64, 128, 256), "tasks_per_thread": (2, 4, 8, 16), "spins": (200, 2000, 20000)}
_RANDOM_ROWS = 16  # rows of random weights; a matrix repeats them

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Change:
    """A measured setting. gain: speed with the new value divided by that with the default (prefetch) or old value."""

    name: str
    old: str
    new: str
    gain: float


def measure_settings(model: Model, profile: Profile, progress: Progress) -> tuple[Profile, list[Change]]:
    """Return the profile with the best settings measured, which the model then has, and what was compared.

    profile: the one that the model uses. progress: called with a line on what is measured.
    """
    before = get_tuning(model)
    progress("prefetch")
    tuning, results = tune(model, _PREFETCH_SECONDS)
    set_tuning(model, tuning)
    changes = [_prefetch_change(result, before) for result in results]
    runner = _Runner(model)
    names = sorted({result.type_name for result in results})
    changes += [_choose_small_batch(runner, name, progress) for name in names]
    changes += [_choose_field(runner, field, progress) for field in _FIELDS]
    tuning = get_tuning(model)
    return dataclasses.replace(
        profile,
        prefetch={**profile.prefetch, **{name: tuning.prefetch[name] for name in names}},
        max_small_batch={**(profile.max_small_batch or {}), **{name: tuning.max_small_batch[name] for name in names}},
        max_task_rows=tuning.max_task_rows,
        tasks_per_thread=tuning.tasks_per_thread,
        spins=tuning.spins,
    ), changes


class _Runner:
    """Times forward passes of a model with several settings."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._kv = KvCache(model, max(MAX_SMALL_BATCH, *(n // PAGE_TOKENS for n in _ROUNDS)))

    def seconds(self, n_tokens: int, tuning: Tuning) -> float:
        """Return the time of a pass: of n_tokens sequences of one token, or of a prompt if those are too many."""
        set_tuning(self.model, tuning)
        tokens = np.ones(n_tokens, np.int32)
        numbers = np.arange(n_tokens, dtype=np.int32)
        if n_tokens <= MAX_SMALL_BATCH:
            positions, seq_ids, rows = np.zeros_like(numbers), numbers, numbers
            tables = [np.array([i], np.int32) for i in range(n_tokens)]
        else:
            positions, seq_ids, rows = numbers, np.zeros_like(numbers), numbers[-1:]
            tables = [np.arange(-(-n_tokens // PAGE_TOKENS), dtype=np.int32)]
        start = time.perf_counter()
        forward(self.model, self._kv, tokens, positions, seq_ids, tables, [False] * len(tables), rows)
        return time.perf_counter() - start

    def gain(self, rounds: Mapping[int, int], new: Tuning, old: Tuning) -> float:
        """Return the speed with `new` divided by that with `old`: the geometric mean over passes.

        rounds: by the number of tokens of a pass.
        """
        gains = []
        for n, n_rounds in rounds.items():
            ratios = []
            for i in range(n_rounds):
                order = (new, old) if i % 2 else (old, new)
                first, second = (self.seconds(n, tuning) for tuning in order)
                ratios.append(first / second if i % 2 == 0 else second / first)
            gains.append(statistics.median(ratios))
        return statistics.geometric_mean(gains)


def _choose_small_batch(runner: _Runner, name: str, progress: Progress) -> Change:
    """Find the largest batch for which the small-batch path of a type is as fast as the prefill path."""
    tuning = get_tuning(runner.model)
    old, gain = tuning.max_small_batch[name], 1.0
    best = _with_small_batch(tuning, name, MAX_SMALL_BATCH)
    for n in _SMALL_BATCHES:
        progress(f"small-batch path of {name}, {n} tokens")
        lower = _with_small_batch(tuning, name, n - 1)
        n_gain = runner.gain({n: _SMALL_BATCH_ROUNDS}, lower, best)
        if n_gain < 1 + _MIN_GAIN:
            break
        best, gain = lower, n_gain
    set_tuning(runner.model, best)
    return Change(f"largest small batch, {name}", str(old), str(best.max_small_batch[name]), gain)


def _with_small_batch(tuning: Tuning, name: str, n: int) -> Tuning:
    return tuning._replace(max_small_batch={**tuning.max_small_batch, name: n})


def _choose_field(runner: _Runner, field: str, progress: Progress) -> Change:
    """Choose the value of a field of Tuning: the fastest, if it is clearly faster than the one in use."""
    tuning = get_tuning(runner.model)
    old = getattr(tuning, field)
    best, best_gain = old, 1.0
    for value in _FIELDS[field]:
        if value != old:
            progress(f"{field} {value}")
            gain = runner.gain(_ROUNDS, _with(tuning, field, value), tuning)
            if gain > max(best_gain, 1 + _MIN_GAIN):
                best, best_gain = value, gain
    set_tuning(runner.model, _with(tuning, field, best))
    return Change(field.replace("_", " "), str(old), str(best), best_gain)


def _with(tuning: Tuning, field: str, value: int) -> Tuning:
    changed: dict[str, Any] = {field: value}
    return tuning._replace(**changed)


def _prefetch_change(result: TuneResult, before: Tuning) -> Change:
    index = BATCH_CLASSES.index(result.n_tokens)
    old = _prefetch(before.prefetch[result.type_name][index])
    gain = result.default_seconds / result.chosen_seconds
    return Change(f"prefetch, {result.type_name}, {_class_name(index)}", old, _prefetch(result.prefetch), gain)


def _class_name(index: int) -> str:
    """Return the batch sizes of a class, such as "2-4" tokens."""
    return f"{BATCH_CLASSES[index - 1] + 1}-{BATCH_CLASSES[index]}" if index else "1"


def _prefetch(p: Prefetch) -> str:
    parts = [f"{name} {n / 1024:g} KiB" for name, n in (("L1", p.l1_bytes), ("L2", p.l2_bytes)) if n]
    return " + ".join([*parts, *(["next page"] if p.next_page else [])]) or "none"


def random_model(n_threads: int, tier: str | None, layers_per_type: int = 2, n_embd: int = 3072) -> Model:
    """Return a model with random weights of every type that the tier packs, and Phi-3-mini's sizes otherwise.

    layers_per_type: more of them need more memory; n_embd: width, a multiple of 256. Raises MemoryLimitError.
    """
    n_ffn = n_embd * 8 // 3
    types = [
        traits.type_id
        for traits in TENSOR_TYPES.values()
        if traits.quantised_activations and _matrix(traits.type_id, _RANDOM_ROWS, 256).packed_bytes(tier)
    ]
    config = _config(n_embd, n_ffn, max(1, layers_per_type * len(types)))
    layer_types = [type_id for type_id in types for _ in range(layers_per_type)] or [0]
    weights_per_layer = 4 * n_embd * n_embd + 3 * n_ffn * n_embd
    traits = [TENSOR_TYPES[type_id] for type_id in layer_types]
    n_bytes = sum(weights_per_layer * each.block_bytes // each.block_elements for each in traits)
    if n_bytes > machine.memory_available() * 3 // 4:
        raise MemoryLimitError(
            f"random weights need {n_bytes / 2**30:.1f} GiB, but only {machine.memory_available() / 2**30:.1f} GiB are "
            "free: measure with a smaller model (-m)"
        )
    norm = Norm(np.ones(n_embd, np.float32), None)
    head = _matrix(layer_types[-1], config.n_vocab, n_embd)
    inv_freq = np.ones(config.rope_dims // 2, np.float32)
    layers = tuple(_layer(type_id, n_embd, n_ffn, norm) for type_id in layer_types)
    weights = Weights(head, norm, head, layers, inv_freq, inv_freq, file=None)
    return Model(config, weights, n_threads=n_threads, tier=tier)


def _config(n_embd: int, n_ffn: int, n_layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="phi3",
        name="random weights",
        n_layers=n_layers,
        n_embd=n_embd,
        n_ffn=n_ffn,
        n_heads=n_embd // 96,
        n_kv_heads=n_embd // 96,
        head_dim=96,
        rope_dims=96,
        n_vocab=4096,
        n_ctx_train=4096,
        n_ctx_orig=4096,
        long_rope=False,
        norm_eps=1e-5,
        rope_style="neox",
        rope_freq_base=10000.0,
        rope_attn_factor=1.0,
        window=None,
        rope_scale=1.0,
        fused_qkv=True,
        fused_gate_up=True,
    )


def _layer(type_id: int, n_embd: int, n_ffn: int, norm: Norm) -> LayerWeights:
    square = _matrix(type_id, n_embd, n_embd, row_unit=96)
    up = _matrix(type_id, n_ffn, n_embd)
    ffn = FeedForward(up, up, _matrix(type_id, n_embd, n_ffn))
    return LayerWeights(norm, square, square, square, square, norm, None, (ffn,))


def _matrix(type_id: int, n_rows: int, n_cols: int, row_unit: int = 0) -> Matrix:
    """Return a matrix of a few random rows, repeated."""
    x = np.random.default_rng(0).normal(0, n_cols**-0.5, (_RANDOM_ROWS, n_cols)).astype(np.float32)
    rows = quantize_rows(type_id, x)
    return Matrix(type_id, n_rows, n_cols, np.tile(rows, (n_rows // _RANDOM_ROWS, 1)).reshape(-1), row_unit=row_unit)
