"""`phi-c tokens`."""

import json
from pathlib import Path

import pytest
from run_cli import run_cli

from tiny_gguf import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf")


def test_output_formats(model: Path) -> None:
    rows = json.loads(run_cli("tokens", "-m", model, "--json", "the é<|end|>").stdout)
    assert rows[0] == {"id": 1, "piece": "<s>"}
    assert "".join(row["piece"] for row in rows[1:]) == " the \\xc3\\xa9<|end|>"
    ids = run_cli("tokens", "-m", model, "--ids", "the é<|end|>").stdout
    assert [int(i) for i in ids.split()] == [row["id"] for row in rows]
    assert run_cli("tokens", "-m", model, "--count", "the é<|end|>").stdout == f"{len(rows)}\n"
    assert run_cli("tokens", "-m", model, "--count", "-", stdin="the é<|end|>").stdout == f"{len(rows)}\n"
    table = run_cli("tokens", "-m", model, "the").stdout.splitlines()
    assert table[0] == '      1  "<s>"'
    assert len(table) == 2


def test_special_tokens_and_bos(model: Path) -> None:
    parsed = run_cli("tokens", "-m", model, "--parse-special", "--no-bos", "--json", "<|end|>").stdout
    assert [row["piece"] for row in json.loads(parsed)] == ["<|end|>"]


def test_stdin_that_is_not_utf8(model: Path) -> None:
    done = run_cli("tokens", "-m", model, "-", stdin=b"\xff")
    assert done.returncode == 2
    assert "stdin is not UTF-8 text" in done.stderr
