"""The kernels that `phi-c bench --kernels` measures: a loop over each, and what a call of it reads and computes.

Sizes are those of Phi-3-mini where the caller does not choose others.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from phi_c import machine
from phi_c._core import (
    TENSOR_TYPES,
    VECTOR_OPS,
    Arena,
    AttentionLoop,
    BarrierLoop,
    MultiplyLoop,
    ProductLoop,
    ReadLoop,
    TensorType,
    VectorLoop,
    kernel_table,
    max_exact_batch,
    tiers,
)
from phi_c.errors import OptionError
from phi_c.sampling.params import SamplingParams
from phi_c.sampling.sampler import Sampler

OPS = ("matmul", "attention", *dict.fromkeys(op for op, _ in VECTOR_OPS), "sample", "barrier")
N_TOKENS = (1, 4, 16, 512)
CACHE, MEMORY = "cache", "memory"

_N_COLS, _N_FFN, _HEAD_DIM = 3072, 8192, 96
_CACHE_BYTES = 256 << 10  # weights of a product in cache: half of a small second-level cache
_ARENA_BYTES = 256 << 20  # walked by the products in memory: larger than most caches
_READ_BYTES = 4 << 20
_PREFETCH_BYTES = 4096
SMALL_BATCH = 16  # larger batches are limited by arithmetic, wherever the weights are
_PANEL_ROWS = 16
_CONTEXTS = (128, 1024, 4096)
_ATTENTION_TOKENS = (1, 64)  # decode; prefill
_VOCABULARIES = (32064, 200064)
_SAMPLERS = {
    "greedy": SamplingParams(temperature=0),
    "default": SamplingParams(seed=0),
    "top_p": SamplingParams(min_p=0, seed=0),
}


class Loop(Protocol):
    """Calls a kernel n_calls times and returns the seconds that this took."""

    def seconds(self, n_calls: int) -> float: ...


@dataclass(frozen=True)
class Kernel:
    """The identity of a measurement, by which two runs are compared."""

    op: str
    type: str  # tensor type, KV type, or variant of the operation; "": there is only one
    tier: str  # "": the operation is not part of a tier
    n_tokens: int
    size: str  # rows x columns of weights, positions x dimensions of attention, elements, vocabulary, or threads
    data: str  # where weights, keys and values are: CACHE or MEMORY

    def __str__(self) -> str:
        parts = (self.op, self.type, self.tier, f"{self.n_tokens} tokens", self.size, self.data)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Limit:
    """A rate of the core itself, measured in the same run: reading memory, or multiplying without loads."""

    name: str  # "read" or "multiply"
    variant: str = ""  # of "read": the prefetch distance in bytes; of "multiply": "q8" or "f32"
    tier: str = ""


@dataclass(frozen=True)
class Case:
    """A kernel, or a limit, with the loop that measures it."""

    name: Kernel | Limit
    loop: Loop
    n_bytes: int = 0  # weights, or keys and values, that a call reads
    n_macs: int = 0  # multiply-accumulates of a call
    limit: Limit | None = None  # None: unknown


@dataclass(frozen=True)
class Selection:
    """What to measure. None: the default of the measurement."""

    ops: tuple[str, ...] = ("matmul",)
    types: tuple[str, ...] | None = None  # of matmul; None: all
    tiers: tuple[str, ...] | None = None  # None: all but scalar, without the products that a tier inherits
    n_tokens: tuple[int, ...] = N_TOKENS  # of matmul
    n_rows: int | None = None  # of matmul; None: what fits a second-level cache
    n_cols: int | None = None  # of matmul, and the elements of the vector operations
    data: str | None = None  # None: in cache, and for small batches also in memory

    def places(self, n_tokens: int) -> tuple[str, ...]:
        """Return where a batch's weights are: CACHE, MEMORY or both."""
        if self.data is not None:
            return (self.data,)
        return (CACHE, MEMORY) if n_tokens <= SMALL_BATCH else (CACHE,)

    def tier_names(self) -> tuple[str, ...]:
        """Return the tiers to measure."""
        return self.tiers or tuple(tiers()[1:]) or tuple(tiers())


def make_cases(selection: Selection) -> list[Case]:
    """Return the cases of a selection, then the limits that they are compared with.

    Raises OptionError for sizes that a type or an operation does not have, MemoryError.
    """
    arena = Arena(_arena_bytes())
    cases: list[Case] = []
    for op in selection.ops:
        if op == "matmul":
            cases += _products(selection, arena)
        elif op == "attention":
            cases += _attentions(selection, arena)
        elif op == "sample":
            cases += _samplers()
        elif op == "barrier":
            cases += _barriers()
        else:
            cases += _vectors(selection, op)
    limits = dict.fromkeys(case.limit for case in cases if case.limit is not None)
    return cases + list(itertools.chain.from_iterable(_limit_cases(limit, arena) for limit in limits))


def _arena_bytes() -> int:
    return max(_READ_BYTES, min(_ARENA_BYTES, machine.memory_available() // 4) // _READ_BYTES * _READ_BYTES)


def _limit_cases(limit: Limit, arena: Arena) -> Iterator[Case]:
    """Yield the measurements of a limit, of which the fastest counts."""
    if limit.name == "read":
        for distance in (0, _PREFETCH_BYTES):
            loop = ReadLoop(arena, _READ_BYTES, distance)
            yield Case(Limit("read", str(distance)), loop, n_bytes=_READ_BYTES)
    else:
        multiply = MultiplyLoop(limit.tier, quantised=limit.variant == "q8")
        yield Case(limit, multiply, n_macs=multiply.macs)


def _products(selection: Selection, arena: Arena) -> Iterator[Case]:
    n_cols = selection.n_cols or _N_COLS
    rng = np.random.default_rng(0)
    inputs = {n: rng.normal(size=(n, n_cols)).astype(np.float32) for n in selection.n_tokens}
    providers = kernel_table()
    for kind in TENSOR_TYPES.values():
        if selection.types is not None and kind.name not in selection.types:
            continue
        n_rows = _choose_rows(kind, n_cols, selection.n_rows, arena)
        for tier in selection.tier_names():
            if selection.tiers is None and providers[tier][kind.name] != tier:
                continue
            for n, x in inputs.items():
                for data in selection.places(n):
                    loop = ProductLoop(arena, kind.type_id, n_rows, x, tier, walks=data == MEMORY)
                    kernel = Kernel("matmul", kind.name, tier, n, f"{n_rows}x{n_cols}", data)
                    limit = _product_limit(kind, tier, n, data)
                    yield Case(kernel, loop, loop.n_bytes, n_rows * n_cols * n, limit)


def _choose_rows(kind: TensorType, n_cols: int, n_rows: int | None, arena: Arena) -> int:
    if n_cols % kind.block_elements:
        raise OptionError(f"--cols is {n_cols}, expected a multiple of {kind.block_elements}, the block of {kind.name}")
    row_bytes = n_cols // kind.block_elements * kind.block_bytes
    if n_rows is None:
        n_rows = max(_PANEL_ROWS, _CACHE_BYTES // row_bytes // _PANEL_ROWS * _PANEL_ROWS)
    if n_rows * row_bytes > arena.n_bytes:
        raise OptionError(
            f"{n_rows} x {n_cols} weights of {kind.name} have {n_rows * row_bytes} bytes, expected at most "
            f"{arena.n_bytes}: lower --rows or --cols"
        )
    return n_rows


def _product_limit(kind: TensorType, tier: str, n_tokens: int, data: str) -> Limit | None:
    """Return the limit of a product; None: no loop measures it (the scalar tier, AMX tiles)."""
    if data == MEMORY:
        return Limit("read")
    exact = max_exact_batch(tier)
    if tier == "scalar" or (exact is not None and n_tokens > exact and kind.quantised_activations):
        return None
    return Limit("multiply", "q8" if kind.quantised_activations else "f32", tier)


def _attentions(selection: Selection, arena: Arena) -> Iterator[Case]:
    for kv_type, tier, n, context in itertools.product(
        ("f16", "q8"), selection.tier_names(), _ATTENTION_TOKENS, _CONTEXTS
    ):
        for data in selection.places(n):
            loop = AttentionLoop(arena, n, context, 1, _HEAD_DIM, tier, kv_type=kv_type, walks=data == MEMORY)
            n_visible = n * (2 * context - n + 1) // 2
            kernel = Kernel("attention", kv_type, tier, n, f"{context}x{_HEAD_DIM}", data)
            limit = Limit("read") if data == MEMORY else None if tier == "scalar" else Limit("multiply", "f32", tier)
            yield Case(kernel, loop, loop.n_bytes, 2 * n_visible * _HEAD_DIM, limit)


def _vectors(selection: Selection, op: str) -> Iterator[Case]:
    default = {"rope": _HEAD_DIM, "store_kv": _HEAD_DIM, "silu_mul": _N_FFN, "gelu": _N_FFN}.get(op, _N_COLS)
    n = selection.n_cols or default
    if n % 32:
        raise OptionError(f"--cols is {n}, expected a multiple of 32")
    for (_, variant), tier in itertools.product((pair for pair in VECTOR_OPS if pair[0] == op), selection.tier_names()):
        yield Case(Kernel(op, variant, tier, 1, str(n), CACHE), VectorLoop(op, variant, n, tier))


@dataclass(frozen=True)
class _CallLoop:
    """Calls a Python function, whose own overhead is part of what is measured."""

    call: Callable[[], object]

    def seconds(self, n_calls: int) -> float:
        start = time.perf_counter()
        for _ in range(n_calls):
            self.call()
        return time.perf_counter() - start


def _samplers() -> Iterator[Case]:
    for n_vocab, (name, params) in itertools.product(_VOCABULARIES, _SAMPLERS.items()):
        logits = np.random.default_rng(0).normal(0, 3, n_vocab).astype(np.float32)
        sampler = Sampler(params, n_vocab)

        def call(sampler: Sampler = sampler, logits: "np.typing.NDArray[np.float32]" = logits) -> int:
            return sampler.sample(logits, ())

        yield Case(Kernel("sample", name, "", 1, str(n_vocab), CACHE), _CallLoop(call))


def _barriers() -> Iterator[Case]:
    n_cores = machine.usable_cores()
    for n in _thread_counts(n_cores):
        yield Case(Kernel("barrier", "", "", 1, str(n), CACHE), BarrierLoop(n))


def _thread_counts(n_cores: int) -> Iterable[int]:
    """Return 1, 2, 4, ... and n_cores."""
    return sorted({n_cores, *(1 << i for i in range(n_cores.bit_length()))})
