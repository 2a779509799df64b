from collections.abc import Iterable
from mmap import mmap
from typing import IO, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

class TensorType(NamedTuple):
    name: str
    type_id: int
    block_elements: int
    block_bytes: int
    quantised_activations: bool

TENSOR_TYPES: Final[dict[int, TensorType]]
PAGE_TOKENS: Final[int]
KV_PAGE_VERSION: Final[int]
PANEL_VERSION: Final[int]
KV_TYPES: Final[tuple[str, ...]]
PHASES: Final[tuple[str, ...]]

def tiers(*, known: bool = False) -> list[str]: ...
def default_tier() -> str: ...
def max_exact_batch(tier: str | None = None) -> int | None: ...
def kernel_table() -> dict[str, dict[str, str]]: ...
def cpu_features() -> list[str]: ...
def read_bandwidth(n_threads: int, n_bytes: int) -> float: ...
def kv_page_bytes(config: Any, kv_type: str = "f16") -> int: ...
def prefault(buffer: npt.NDArray[np.uint8]) -> int: ...
def read_strings(buffer: bytes | mmap, offset: int, count: int) -> tuple[list[str], int]: ...
def dequantize(
    type_id: int, data: npt.NDArray[np.uint8], n_elements: int, tier: str | None = None
) -> npt.NDArray[np.float32]: ...
def quantize_rows(
    type_id: int, x: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None, n_threads: int = 1
) -> npt.NDArray[np.uint8]: ...

class Q8(NamedTuple):
    quants: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    sums: npt.NDArray[np.float32]
    block_sums: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int32]
    block_offsets: npt.NDArray[np.int32]

def quantize_q8(x: npt.NDArray[np.float32], tier: str | None = None) -> Q8: ...
def matmul(weights: Matrix, x: npt.NDArray[np.float32], tier: str | None = None) -> npt.NDArray[np.float32]: ...
def rms_norm(
    x: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], eps: float, tier: str | None = None
) -> npt.NDArray[np.float32]: ...
def layer_norm(
    x: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
    eps: float,
    tier: str | None = None,
) -> npt.NDArray[np.float32]: ...
def gelu(x: npt.NDArray[np.float32], tier: str | None = None) -> npt.NDArray[np.float32]: ...
def silu_mul(
    gate: npt.NDArray[np.float32], up: npt.NDArray[np.float32], tier: str | None = None
) -> npt.NDArray[np.float32]: ...
def add(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], tier: str | None = None) -> npt.NDArray[np.float32]: ...
def rope(
    x: npt.NDArray[np.float32],
    cos: npt.NDArray[np.float32],
    sin: npt.NDArray[np.float32],
    style: str,
    tier: str | None = None,
) -> npt.NDArray[np.float32]: ...
def store_kv(
    k: npt.NDArray[np.float32], v: npt.NDArray[np.float32], slot: int, tier: str | None = None, kv_type: str = "f16"
) -> npt.NDArray[np.uint8]: ...
def attention(
    q: npt.NDArray[np.float32],
    k: npt.NDArray[np.float32],
    v: npt.NDArray[np.float32],
    query_start: int,
    window: int,
    scale: float,
    tier: str | None = None,
    kv_type: str = "f16",
) -> npt.NDArray[np.float32]: ...

@disjoint_base
class ForkLock:
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...
    @property
    def number(self) -> int: ...

@disjoint_base
class Matrix:
    def __init__(
        self,
        type_id: int,
        n_rows: int,
        n_cols: int,
        data: npt.NDArray[np.uint8],
        *,
        bias: npt.NDArray[np.float32] | None = None,
        row_unit: int = 0,
    ) -> None: ...
    def packed(self, tier: str | None = None) -> Matrix: ...
    def packed_bytes(self, tier: str | None = None) -> int: ...
    @property
    def type_id(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...

@disjoint_base
class Model:
    # config: model.config.ModelConfig, weights: model.weights.Weights; Any, since this module imports nothing above it
    def __init__(
        self,
        config: Any,
        weights: Any,
        *,
        n_threads: int,
        tier: str | None = None,
        layout: str = "packed",
        panels: npt.NDArray[np.uint8] | None = None,
    ) -> None: ...
    @property
    def tier(self) -> str: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def packed_bytes(self) -> int: ...
    def write_panels(self, file: IO[bytes]) -> None: ...
    def close(self) -> None: ...

class Prefetch(NamedTuple):
    l1_bytes: int
    l2_bytes: int
    next_page: bool

class Tuning(NamedTuple):
    prefetch: dict[str, tuple[Prefetch, ...]]
    max_small_batch: dict[str, int]
    max_task_rows: int
    tasks_per_thread: int
    spins: int

class TuneResult(NamedTuple):
    type_name: str
    n_tokens: int
    prefetch: Prefetch
    default_seconds: float
    chosen_seconds: float
    n_samples: int
    is_clear: bool

BATCH_CLASSES: Final[tuple[int, ...]]
MAX_SMALL_BATCH: Final[int]

def default_tuning() -> Tuning: ...
def prefetch_candidates(n_tokens: int) -> list[Prefetch]: ...

@disjoint_base
class KvCache:
    def __init__(self, model: Model, n_pages: int, kv_type: str = "f16") -> None: ...
    @property
    def n_pages(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def read_page(self, page: int) -> npt.NDArray[np.uint8]: ...
    def write_page(self, page: int, data: npt.NDArray[np.uint8]) -> None: ...

@disjoint_base
class CancelFlag:
    def __init__(self, parent: CancelFlag | None = None) -> None: ...
    @property
    def parent(self) -> CancelFlag | None: ...
    def set(self) -> None: ...
    def clear(self) -> None: ...
    def is_set(self) -> bool: ...

@disjoint_base
class Observer:
    def __init__(self, model: Model, *, output: bool = False) -> None: ...
    @property
    def attn_in(self) -> npt.NDArray[np.float64]: ...
    @property
    def attn_out(self) -> npt.NDArray[np.float64]: ...
    @property
    def ffn_in(self) -> npt.NDArray[np.float64]: ...
    @property
    def ffn_inner(self) -> npt.NDArray[np.float64]: ...
    @property
    def expert_in(self) -> npt.NDArray[np.float64]: ...
    @property
    def expert_inner(self) -> npt.NDArray[np.float64]: ...
    @property
    def expert_tokens(self) -> npt.NDArray[np.int64]: ...
    @property
    def output(self) -> npt.NDArray[np.float64] | None: ...
    @property
    def n_tokens(self) -> int: ...
    def clear(self) -> None: ...

def get_tuning(model: Model) -> Tuning: ...
def set_tuning(model: Model, tuning: Tuning) -> None: ...
def tune(
    model: Model, seconds: float, known: Iterable[str] = (), cancel: CancelFlag | None = None
) -> tuple[Tuning, list[TuneResult]]: ...

@disjoint_base
class Timings:
    def __init__(self, model: Model) -> None: ...
    @property
    def working(self) -> npt.NDArray[np.float64]: ...
    @property
    def waiting(self) -> npt.NDArray[np.float64]: ...
    @property
    def n_barriers(self) -> npt.NDArray[np.int64]: ...
    @property
    def n_calls(self) -> int: ...
    def clear(self) -> None: ...

def forward(
    model: Model,
    kv: KvCache,
    tokens: npt.NDArray[np.int32],
    positions: npt.NDArray[np.int32],
    seq_ids: npt.NDArray[np.int32],
    page_tables: list[npt.NDArray[np.int32]],
    long_rope: list[bool],
    logit_rows: npt.NDArray[np.int32],
    cancel: CancelFlag | None = None,
    observer: Observer | None = None,
    hidden_states: bool = False,
    timings: Timings | None = None,
    sequence_cancels: list[CancelFlag] | None = None,
) -> npt.NDArray[np.float32]: ...
def lm_head(model: Model, kv: KvCache, hidden_states: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]: ...

VECTOR_OPS: Final[tuple[tuple[str, str], ...]]

@disjoint_base
class Arena:
    def __init__(self, n_bytes: int) -> None: ...
    @property
    def n_bytes(self) -> int: ...
    def matrix(self, type_id: int, n_rows: int, n_cols: int, tier: str | None = None) -> Matrix: ...

@disjoint_base
class ProductLoop:
    def __init__(
        self,
        arena: Arena,
        type_id: int,
        n_rows: int,
        x: npt.NDArray[np.float32],
        tier: str | None = None,
        *,
        walks: bool = False,
    ) -> None: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def out(self) -> npt.NDArray[np.float32]: ...
    def seconds(self, n_calls: int) -> float: ...

@disjoint_base
class AttentionLoop:
    def __init__(
        self,
        arena: Arena,
        n_tokens: int,
        n_positions: int,
        n_queries: int,
        head_dim: int,
        tier: str | None = None,
        *,
        kv_type: str = "f16",
        walks: bool = False,
    ) -> None: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def out(self) -> npt.NDArray[np.float32]: ...
    def seconds(self, n_calls: int) -> float: ...

@disjoint_base
class VectorLoop:
    def __init__(self, op: str, variant: str, n: int, tier: str | None = None) -> None: ...
    @property
    def inputs(self) -> npt.NDArray[np.float32]: ...
    @property
    def out(self) -> Any: ...  # float32 array, Q8, or uint8 array, by operation
    def seconds(self, n_calls: int) -> float: ...

@disjoint_base
class BarrierLoop:
    def __init__(self, n_threads: int) -> None: ...
    def seconds(self, n_calls: int) -> float: ...

@disjoint_base
class ReadLoop:
    def __init__(self, arena: Arena, n_bytes: int, prefetch_bytes: int = 0) -> None: ...
    @property
    def n_bytes(self) -> int: ...
    def seconds(self, n_calls: int) -> float: ...

@disjoint_base
class MultiplyLoop:
    def __init__(self, tier: str | None = None, *, quantised: bool = True) -> None: ...
    @property
    def macs(self) -> int: ...
    def total(self, n_calls: int) -> float: ...
    def seconds(self, n_calls: int) -> float: ...

class ClockLoop:
    CYCLES: Final[int]
    def seconds(self, n_calls: int) -> float: ...
