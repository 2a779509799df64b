"""benchmarks/quality.py on tiny models: the files it writes, the table and the goals."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gguf
import quality_files
from phi_c import _core
from reference import Reference
from tiny_gguf import write_tiny

SCRIPT = Path(__file__).parents[2] / "benchmarks/quality.py"


def quality(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def nmse(got: np.ndarray, expected: np.ndarray) -> float:
    return float(((got - expected) ** 2).sum() / (expected**2).sum())


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_planted_outliers_do_not_change_float32_logits(tmp_path: Path, architecture: str) -> None:
    path = write_tiny(tmp_path / "m.gguf", architecture, "Q8_0")
    weights = quality_files.read(path)
    quality_files.plant_outliers(weights, 64.0, 3)
    planted = quality_files.write(
        weights, tmp_path / "p.gguf", dict.fromkeys(weights.types, gguf.GGMLQuantizationType.F32)
    )
    before, after = Reference(path), Reference(planted)
    tokens = list(range(3, 40))
    assert nmse(after.logits(tokens), before.logits(tokens)) < 1e-10
    norm = "blk.1.ffn_norm.weight"
    assert sorted(np.round(after.tensors[norm] / before.tensors[norm]))[-4:] == [1, 64, 64, 64]


def test_padding_for_k_quants_does_not_change_float32_logits(tmp_path: Path) -> None:
    sizes = {"n_embd": 192, "n_heads": 3, "n_kv_heads": 3, "head_dim": 64}
    path = write_tiny(tmp_path / "m.gguf", "llama", "Q8_0", **sizes)
    weights = quality_files.read(path)
    quality_files.pad_to_super_blocks(weights)
    padded = quality_files.write(
        weights, tmp_path / "p.gguf", dict.fromkeys(weights.types, gguf.GGMLQuantizationType.F32)
    )
    tokens = list(range(3, 40))
    expected = Reference(path)
    got = Reference(padded)
    assert got.tensors["blk.0.attn_output.weight"].shape == (256, 256)
    assert nmse(got.logits(tokens), expected.logits(tokens)) < 1e-10


def test_table_and_goals(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", "Q4_1", vocabulary="bpe")
    best = _core.tiers()[-1]
    sizes = ("--windows", 2, "--tokens", 40, "--threads", 1, "--tier", best, "--python", "llama-cpp-python=/nowhere")
    done = quality(path, *sizes, "--limit", 1)
    assert done.returncode == 0, done.stderr
    assert "llama-cpp-python is not installed: " in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith(f"| phi-c, {best} | ")]
    assert 0 < float(rows[0].split("|")[2].split()[0]) < 0.01
    assert f"\nmet: phi-c, {best}: mean KL " in done.stdout
    missed = quality(path, *sizes, "--limit", 0)
    assert missed.returncode == 1
    assert f"\nNOT MET: phi-c, {best}: mean KL " in missed.stdout


def test_errors_are_one_line(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    path = write_tiny(tmp_path / "tiny.gguf")
    assert quality(path, "--text", text).stderr.startswith("quality.py: error: the text has ")
    missing = quality(tmp_path / "nothing.gguf")
    assert missing.stderr.startswith("quality.py: error: ") and missing.returncode == 1
