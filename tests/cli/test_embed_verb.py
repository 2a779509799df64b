"""`phi-c embed` in its own process."""

import json
from pathlib import Path

import numpy as np
import pytest
from run_cli import run_cli

import phi_c
from tiny_gguf import write_tiny

INPUTS = ["the in of", "and", "it is on"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0")


def test_json_lines_match_the_library(model: Path) -> None:
    with phi_c.load(model) as llm:
        expected = llm.embed(INPUTS)
    for arguments, stdin in ((INPUTS, ""), (["-"], "\n".join(INPUTS) + "\n")):
        done = run_cli("embed", "-m", model, *arguments, stdin=stdin)
        assert (done.returncode, done.stderr) == (0, "")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["index"] for row in rows] == [0, 1, 2]
        assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), expected)


def test_output_file_and_options(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    with phi_c.load(model) as llm:
        expected = llm.embed(INPUTS, pooling="last", normalize=False)
    done = run_cli("embed", "-m", model, "--pooling", "last", "--no-normalize", "--output", out, *INPUTS)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{out}: 3 vectors of 256 dimensions\n"
    saved = np.load(out)
    assert saved.dtype == np.float32
    assert np.array_equal(saved, expected)
    assert not np.allclose(np.linalg.norm(saved, axis=1), 1)


def test_errors_are_one_line(model: Path, tmp_path: Path) -> None:
    cases: list[tuple[tuple[str, ...], bytes, int, str]] = [
        (("-",), b"", 2, "there is no input on stdin, expected one per line"),
        (("-",), b"\xff", 2, "stdin is not UTF-8 text"),
        (("-c", "8", "the in of " * 20), b"", 1, "context size of 8"),
        (("--output", str(tmp_path), "the"), b"", 1, "cannot be written"),
    ]
    for arguments, stdin, code, message in cases:
        done = run_cli("embed", "-m", model, *arguments, stdin=stdin)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stderr
        assert message in done.stderr
    assert run_cli("embed", "-m", model, "--pooling", "max", "the").returncode == 2
    assert run_cli("embed", "-m", model).returncode == 2
