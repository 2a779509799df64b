"""Times of the phases of the forward pass, and the rates at which they read their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from phi_c._core import PHASES, TENSOR_TYPES, Timings
from phi_c.gguf.reader import GGUFFile, TensorInfo
from phi_c.model.architectures import EXPERTS_USED

Floats = npt.NDArray[np.float64]

PYTHON = "python"  # the part of a step outside of the forward pass: scheduler and sampling
_PHASE_OF_TENSOR = {
    "attn_qkv": "qkv",
    "attn_q": "qkv",
    "attn_k": "qkv",
    "attn_v": "qkv",
    "attn_output": "attn_output",
    "ffn_gate_inp": "router",
    "ffn_gate": "gate_up",
    "ffn_up": "gate_up",
    "ffn_gate_exps": "gate_up",
    "ffn_up_exps": "gate_up",
    "ffn_down": "down",
    "ffn_down_exps": "down",
    "output": "lm_head",
}


class Case(NamedTuple):
    """What a step does: prefill of a prompt of n_tokens, or decode of n_seqs sequences, each after n_tokens tokens."""

    kind: str  # "prefill" or "decode"
    n_seqs: int
    n_tokens: int


class PhaseWeights(NamedTuple):
    """The weights that a phase multiplies with one token, in all layers."""

    n_bytes: int
    n_weights: int


@dataclass(frozen=True)
class PhaseSample:
    """Times of one repetition, in seconds per step."""

    working: Floats  # [n_threads, n_phases]
    waiting: Floats  # [n_threads, n_phases]
    n_barriers: Floats  # [n_phases]
    python: float  # outside of the forward pass
    n_steps: int
    n_tokens: float  # tokens per step


def phase_weights(file: GGUFFile) -> dict[str, PhaseWeights]:
    """Return the weights of each phase that has any; of experts, those that one token uses.

    A tied embedding counts as the output matrix. Of an embedding that is not tied, a token reads a single row.
    """
    found: dict[str, PhaseWeights] = {}
    is_tied = "output.weight" not in file.tensors
    for name, info in file.tensors.items():
        tensor = name.removesuffix(".weight").rpartition(".")[2]
        phase = "lm_head" if is_tied and tensor == "token_embd" else _PHASE_OF_TENSOR.get(tensor)
        if phase is not None and len(info.shape) > 1:
            so_far, n_bytes = found.get(phase, PhaseWeights(0, 0)), _bytes_per_token(info)
            kind = TENSOR_TYPES[info.type_id]
            n_weights = n_bytes // kind.block_bytes * kind.block_elements
            found[phase] = PhaseWeights(so_far.n_bytes + n_bytes, so_far.n_weights + n_weights)
    return found


def _bytes_per_token(info: TensorInfo) -> int:
    return info.n_bytes if len(info.shape) == 2 else info.n_bytes // info.shape[0] * EXPERTS_USED


def take_sample(timings: Timings, seconds: float, n_tokens: int) -> PhaseSample:
    """Return the times collected since the last `clear`; seconds: duration of the steps, n_tokens: their tokens."""
    n = timings.n_calls
    working, waiting = timings.working / n, timings.waiting / n
    python = seconds / n - float((working + waiting)[0].sum())  # thread 0 calls the forward pass
    return PhaseSample(working, waiting, timings.n_barriers / n, max(python, 0.0), n, n_tokens / n)


def report_phases(
    case: Case,
    samples: Sequence[PhaseSample],
    weights: dict[str, PhaseWeights],
    read_rate: float | None,
    has_experts: bool,
) -> dict[str, Any]:
    """Return the report of a case: the median of its repetitions, ready for JSON.

    read_rate: bytes per second; None if unknown. has_experts: the weights read by several tokens are unknown then.
    """
    working = np.median([s.working for s in samples], axis=0)
    waiting = np.median([s.waiting for s in samples], axis=0)
    python = float(np.median([s.python for s in samples]))
    n_tokens = samples[0].n_tokens
    seconds = (working + waiting).mean(axis=0)
    step = float(seconds.sum()) + python
    rows = []
    for i, phase in enumerate(PHASES):
        if seconds[i] == 0:
            continue
        row: dict[str, Any] = {
            "phase": phase,
            "ms": _round(seconds[i] * 1e3),
            "share": _round(seconds[i] / step),
            "working_ms": [_round(x * 1e3) for x in working[:, i]],
            "waiting_ms": [_round(x * 1e3) for x in waiting[:, i]],
            "imbalance": _round(working[:, i].max() / working[:, i].mean()) if working[:, i].any() else None,
            "waiting_share": _round(waiting[:, i].mean() / seconds[i]),
            "n_barriers": _round(samples[0].n_barriers[i]),
        }
        of_phase = weights.get(phase)
        if of_phase is not None:
            reads_unknown = has_experts and n_tokens > 1 and phase in ("gate_up", "down")
            rate = None if reads_unknown else of_phase.n_bytes / seconds[i]
            n_products = case.n_seqs / samples[0].n_steps if case.kind == "prefill" else case.n_seqs
            n_rows = n_products if phase == "lm_head" else n_tokens
            row |= {
                "weight_bytes": None if reads_unknown else of_phase.n_bytes,
                "gb_s": None if rate is None else _round(rate / 1e9),
                "read_share": None if rate is None or read_rate is None else _round(rate / read_rate),
                "gmac_s": _round(of_phase.n_weights * n_rows / seconds[i] / 1e9),
            }
        rows.append(row)
    rows.append({"phase": PYTHON, "ms": _round(python * 1e3), "share": _round(python / step)})
    return {
        "kind": case.kind,
        "n_seqs": case.n_seqs,
        "n_tokens": case.n_tokens,
        "n_steps": samples[0].n_steps,
        "step_ms": _round(step * 1e3),
        "phases": rows,
    }


def _round(value: float) -> float:
    return round(float(value), 4)
