"""benchmarks/compare.py on a tiny model: the table, engines that are not installed, engines that fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from phi_c import _core
from tiny_gguf import write_tiny

SCRIPT = Path(__file__).parents[2] / "benchmarks/compare.py"


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf")


def test_table(tiny: Path) -> None:
    sizes = ("--prefill", 40, "--decode", 3, "--batch", "2,3", "--rounds", 2, "--threads", 1)
    tiers = ("--tier", _core.tiers()[-1], "--tier", "scalar")
    done = compare(tiny, *sizes, *tiers, "--only", "phi-c", "--only", "xllamacpp", "--python", "xllamacpp=/nowhere")
    assert done.returncode == 0, done.stderr
    assert "xllamacpp is not installed: pip install xllamacpp" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert lines[0] == "| engine | prefill 40 | decode | batch 2 | batch 3 |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == [f"phi-c ({_core.tiers()[-1]})", "phi-c (scalar)"]
    first, second = ([cell.split() for cell in line.split("|")[2:-1]] for line in lines[2:])
    for (best,), (scalar, ratio) in zip(first, second, strict=True):
        assert float(best) / float(scalar) == pytest.approx(float(ratio.strip("()")), rel=0.1, abs=0.02)


def test_failing_engine(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    done = compare(broken, "--only", "phi-c", "--rounds", 1)
    assert "phi-c failed: " in done.stderr and "broken.gguf" in done.stderr
    assert done.returncode == 1


def test_missing_model() -> None:
    assert compare().stderr == "compare.py: error: MODEL is missing, expected a GGUF file\n"
    assert compare("nowhere.gguf").stderr == "compare.py: error: nowhere.gguf does not exist, expected a GGUF file\n"
