"""Reports of the phases of the forward pass: weights of each phase, and figures of known times."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi_c._core import PHASES
from phi_c.bench.phases import Case, PhaseSample, PhaseWeights, phase_weights, report_phases
from phi_c.gguf.reader import GGUFFile
from phi_c.model.config import read_config
from tiny_gguf import write_tiny

QKV, ATTENTION, LM_HEAD = (PHASES.index(name) for name in ("qkv", "attention", "lm_head"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_weights_of_each_phase(tmp_path: Path, architecture: str, tied: bool) -> None:
    """2 layers, hidden size 256, feed-forward size 512, 4 heads and 2 KV heads of 64; Q8_0: 34 bytes per 32 weights."""
    with GGUFFile(write_tiny(tmp_path / "tiny.gguf", architecture, "Q8_0", tied=tied)) as file:
        found, n_vocab = phase_weights(file), read_config(file).n_vocab
    n_weights = {
        "qkv": 2 * 256 * (4 + 2 + 2) * 64,
        "attn_output": 2 * 4 * 64 * 256,
        "gate_up": 2 * 2 * 256 * 512,
        "down": 2 * 256 * 512,
        "lm_head": 256 * n_vocab,
    }
    assert found == {phase: PhaseWeights(n // 32 * 34, n) for phase, n in n_weights.items()}


def test_a_token_uses_two_experts(tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "tiny.gguf", "phimoe", "Q8_0", n_experts=8, n_layers=2)) as file:
        found, config = phase_weights(file), read_config(file)
    assert found["gate_up"].n_weights == 2 * 2 * 2 * config.n_embd * config.n_ffn
    assert found["down"].n_weights == 2 * 2 * config.n_embd * config.n_ffn
    assert found["router"].n_weights == 2 * 8 * config.n_embd


def sample(scale: float, n_tokens: int, n_steps: int = 1) -> PhaseSample:
    working, waiting, n_barriers = np.zeros((2, len(PHASES))), np.zeros((2, len(PHASES))), np.zeros(len(PHASES))
    working[:, QKV], waiting[:, QKV], n_barriers[QKV] = (0.003, 0.001), (0.001, 0.003), 32
    working[:, ATTENTION], waiting[:, ATTENTION], n_barriers[ATTENTION] = (0.002, 0.002), (0, 0), 32
    working[:, LM_HEAD], n_barriers[LM_HEAD] = (0.001, 0.001), 1
    return PhaseSample(working * scale, waiting * scale, n_barriers, 0.001 * scale, n_steps, n_tokens)


WEIGHTS = {"qkv": PhaseWeights(80_000_000, 160_000_000), "lm_head": PhaseWeights(10_000_000, 20_000_000)}


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["phase"]: row for row in report["phases"]}


def test_figures_of_the_median_repetition() -> None:
    samples = [sample(scale, n_tokens=4) for scale in (1.0, 0.9, 50.0)]  # the last one was disturbed
    report = report_phases(Case("decode", 4, 0), samples, WEIGHTS, 25e9, False)
    assert {key: report[key] for key in ("kind", "n_seqs", "n_tokens", "n_steps", "step_ms")} == {
        "kind": "decode", "n_seqs": 4, "n_tokens": 0, "n_steps": 1, "step_ms": 8.0,
    }  # fmt: skip
    found = rows(report)
    assert list(found) == ["qkv", "attention", "lm_head", "python"]
    assert sum(row["share"] for row in report["phases"]) == pytest.approx(1, abs=1e-3)
    assert sum(row["ms"] for row in report["phases"]) == pytest.approx(report["step_ms"])
    assert found["qkv"] == {
        "phase": "qkv", "ms": 4.0, "share": 0.5, "working_ms": [3.0, 1.0], "waiting_ms": [1.0, 3.0], "imbalance": 1.5,
        "waiting_share": 0.5, "n_barriers": 32, "weight_bytes": 80_000_000, "gb_s": 20.0, "read_share": 0.8,
        "gmac_s": 160.0,
    }  # fmt: skip
    assert found["attention"]["imbalance"] == 1 and "gb_s" not in found["attention"]
    assert found["lm_head"]["gmac_s"] == 80  # 4 rows of logits
    assert found["python"] == {"phase": "python", "ms": 1.0, "share": 0.125}


def test_prefill_computes_one_row_of_logits() -> None:
    found = rows(report_phases(Case("prefill", 1, 1024), [sample(1.0, 512, n_steps=2)], WEIGHTS, None, False))
    assert found["qkv"]["gmac_s"] == 160e6 * 512 / 4e-3 / 1e9
    assert found["lm_head"]["gmac_s"] == 20e6 * 0.5 / 1e-3 / 1e9
    assert found["qkv"]["gb_s"] == 20 and found["qkv"]["read_share"] is None


@pytest.mark.parametrize(("n_tokens", "is_known"), [(1, True), (2, False)])
def test_bytes_of_experts_are_known_for_one_token(n_tokens: int, is_known: bool) -> None:
    times = sample(1.0, n_tokens)
    times.working[:, PHASES.index("down")] = 0.001
    weights = {"down": PhaseWeights(1_000_000, 2_000_000)}
    row = rows(report_phases(Case("decode", n_tokens, 0), [times], weights, 25e9, True))["down"]
    assert (row["gb_s"], row["weight_bytes"]) == ((1.0, 1_000_000) if is_known else (None, None))
    assert row["gmac_s"] == 2.0 * n_tokens
