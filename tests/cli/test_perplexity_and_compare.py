"""`phi-c perplexity` and `phi-c compare` in their own processes: figures, JSON, stdin, errors, Ctrl-C."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_cli import command, run_cli

import phi_c
from phi_c.evaluate import compare, perplexity
from tiny_gguf import write_tiny

TEXT = "the and in of it is on at or then there hand thing " * 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0", n_ctx=8192)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_perplexity_matches_the_library(model: Path, text: Path) -> None:
    with phi_c.load(model) as llm:
        expected = perplexity(llm, TEXT, n_ctx=64)
        strided = perplexity(llm, TEXT, n_ctx=64, stride=32, n_windows=2)
    done = run_cli("perplexity", "-m", model, "-c", "64", text)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == (
        f"perplexity {expected.perplexity:.4f} ± {expected.standard_error:.4f} "
        f"({expected.n_tokens} tokens in {expected.n_windows} windows of 64)\n"
    )
    arguments = ("perplexity", "-m", model, "-c", "64", "--stride", "32", "--chunks", "2", "--json")
    for done in (run_cli(*arguments, text), run_cli(*arguments, "-", stdin=TEXT)):
        found = json.loads(done.stdout)
        assert found["perplexity"] == pytest.approx(strided.perplexity)
        assert (found["n_windows"], found["n_ctx"], found["stride"]) == (2, 64, 32)
    one = run_cli("perplexity", "-m", model, "-c", "64", "--chunks", "1", "--json", text)
    assert json.loads(one.stdout)["standard_error"] is None
    assert "±" not in run_cli("perplexity", "-m", model, "-c", "64", "--chunks", "1", text).stdout


def test_compare_reports_kl_divergence_and_top1_agreement(model: Path, text: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", "llama", "Q8_0", seed=3)
    with phi_c.load(model) as a, phi_c.load(other) as b:
        expected = compare(a, b, TEXT, n_ctx=64)
    done = run_cli("compare", "-m", other, "--reference", model, "--text", text, "-c", "64", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kl"] == pytest.approx(expected.kl)
    assert (found["model"], found["reference"], found["n_windows"]) == ("other.gguf", "tiny.gguf", expected.n_windows)
    assert found["by_position"][0]["kl"] == pytest.approx(expected.by_position[0].kl)
    table = run_cli("compare", "-m", model, "--reference", model, "--text", "-", "-c", "64", stdin=TEXT)
    assert table.returncode == 0, table.stderr
    assert "KL divergence, mean" in table.stdout and "0.00000 ± 0.00000" in table.stdout
    assert "top-1 agreement" in table.stdout
    assert "100.00% ± 0.00%" in table.stdout
    assert "56-63" in table.stdout


def test_errors_are_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"ab\xff")
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("perplexity", "-m", model, text), 2, "expected at least 512: 1 window of 512"),
        (("perplexity", "-m", model, "-c", "64", "--stride", "65", text), 2, "stride is 65, expected an integer"),
        (("perplexity", "-m", model, "-c", "9000", text), 2, "n_ctx is 9000, expected 1 to 8192"),
        (("perplexity", "-m", model, binary), 2, "is not UTF-8 text: invalid byte 0xff at offset 2"),
        (("perplexity", "-m", tmp_path / "none.gguf", text), 1, "none.gguf"),
        (("perplexity", "-m", model, tmp_path / "none.txt"), 2, "none.txt cannot be read: No such file"),
        (("compare", "-m", model, "--reference", model, "--text", tmp_path), 2, "cannot be read: "),
    ]
    for arguments, code, message in cases:
        done = run_cli(*map(str, arguments))
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    for wrong in (("-c", "1"), ("--chunks", "0"), ("--stride", "0"), ("--strides", "5")):
        assert run_cli("perplexity", "-m", model, *wrong, text).returncode == 2
    for missing in (
        ("-m", model, "--reference", model),
        ("-m", model, "--text", text),
        ("--reference", model, "--text", text),
    ):
        assert run_cli("compare", *missing).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("verb", ["perplexity", "compare"])
def test_ctrl_c_exits_with_130(model: Path, verb: str) -> None:
    arguments = {
        "perplexity": ("perplexity", "-m", model, "-c", "4096", "--stride", "8", "--json", "-"),
        "compare": ("compare", "-m", model, "--reference", model, "-c", "4096", "--json", "--text", "-"),
    }[verb]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(*arguments), **pipes) as process:
        assert process.stdin is not None
        process.stdin.write(TEXT.encode() * 400)  # more than a pipe buffers: the write returns once the verb reads it
        process.stdin.close()
        process.stdin = None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert (output, errors.strip()) == (b"", b"")  # click ends the line
