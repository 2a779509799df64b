"""`phi-c imatrix` in its own process."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from run_cli import command, run_cli

from phi_c.quantize.imatrix import load_imatrix
from tiny_gguf import write_tiny

TEXT = (Path(__file__).parents[1] / "english.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def n_chunks(path: Path) -> int:
    return load_imatrix(path).n_chunks


def test_text_from_a_file_and_from_stdin(model: Path, text: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    done = run_cli("imatrix", "-m", model, "-c", "64", "--chunks", "3", "-o", a, text)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{a}: 3 chunks of 64 tokens, 8 matrices\n"
    done = run_cli("imatrix", "-m", model, "-c", "64", "--chunks", "3", "-o", b, "--process-output", "-", stdin=TEXT)
    assert done.returncode == 0, done.stderr
    first, second = load_imatrix(a), load_imatrix(b)
    assert (first.datasets, second.datasets) == ([str(text)], ["stdin"])
    assert set(second.entries) == {*first.entries, "output.weight"}
    assert all(np.array_equal(entry.sums, second.entries[name].sums) for name, entry in first.entries.items())


def test_intermediate_files_and_continuation(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    options = ("-m", model, "-c", "64", "--save-frequency", "2", "-o", out, text)
    assert run_cli("imatrix", "--chunks", "5", *options).returncode == 0
    assert n_chunks(out) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i.gguf", "i.gguf.at_2", "i.gguf.at_4", "text.txt"]
    assert n_chunks(tmp_path / "i.gguf.at_4") == 4
    done = run_cli("imatrix", "--in-file", out, "--from-chunk", "5", "--chunks", "2", *options)
    assert done.returncode == 0, done.stderr
    assert n_chunks(tmp_path / "i.gguf.at_7") == n_chunks(out) == 7
    assert load_imatrix(out).datasets == [str(text)] * 2


def test_merging_files(model: Path, text: Path, tmp_path: Path) -> None:
    a, b, both = (tmp_path / f"{name}.gguf" for name in ("a", "b", "both"))
    for path, options in ((a, ("--chunks", "2")), (b, ("--from-chunk", "2", "--chunks", "3"))):
        assert run_cli("imatrix", "-m", model, "-c", "64", *options, "-o", path, text).returncode == 0
    done = run_cli("imatrix", "--in-file", a, "--in-file", b, "-c", "64", "-o", both)
    assert done.returncode == 0, done.stderr
    assert n_chunks(both) == 5
    other = write_tiny(tmp_path / "other.gguf", n_ffn=768)
    assert run_cli("imatrix", "-m", other, "-c", "64", "--chunks", "1", "-o", b, text).returncode == 0
    done = run_cli("imatrix", "--in-file", a, "--in-file", b, "-o", both)
    assert done.returncode == 2
    assert "b.gguf cannot be added to the files before it: blk.0.ffn_down.weight has 768 columns" in done.stderr
    done = run_cli("imatrix", "-m", model, "--in-file", b, "-c", "64", "-o", both, text)
    assert done.returncode == 1
    assert "the importance matrix belongs to another model" in done.stderr
    assert n_chunks(both) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process on Windows")
@pytest.mark.parametrize("frequency", ["1", "1000000"])
def test_ctrl_c_saves_the_finished_chunks(model: Path, tmp_path: Path, frequency: str) -> None:
    text, out = tmp_path / "long.txt", tmp_path / "i.gguf"
    text.write_text(TEXT * 300, encoding="utf-8")
    options = ("-c", "64", "--save-frequency", "1", "--output-frequency", frequency, "-o", out)
    with subprocess.Popen(command("imatrix", "-m", model, *options, text), stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "i.gguf.at_3").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert out.exists() == (frequency == "1")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    done = n_chunks(out)
    assert done >= 3
    assert f"interrupted: wrote {done} of " in stderr.decode()
    assert f"continue with --in-file {out} --from-chunk {done}" in stderr.decode()
    assert not list(tmp_path.glob("*.part"))


def test_errors(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    cases: list[tuple[tuple[str | Path, ...], int, str]] = [
        ((), 2, "missing TEXT_FILE"),
        ((tmp_path / "none.txt",), 2, "none.txt cannot be read: No such file"),
        ((text, "-c", "0"), 2, "--ctx-size"),
        ((text, "-c", "4096"), 2, "n_ctx is 4096, expected 1 to 512"),
        ((text, "-c", "512", "--from-chunk", "90"), 2, "expected at least 46592: 91 windows of 512"),
        ((text, "--in-file", tmp_path / "none.gguf"), 1, "none.gguf: no such file"),
        ((text, "--in-file", model), 1, "expected an importance matrix, found"),
        ((text, "-o", tmp_path), 1, "it is a folder"),
        ((text, "-o", tmp_path / "no/where.gguf"), 1, "is not a writable folder"),
    ]
    for arguments, code, message in cases:
        done = run_cli("imatrix", "-m", model, "-o", out, *arguments)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert not out.exists()
    done = run_cli("imatrix", text, "-o", out)
    assert (done.returncode, "missing option '-m' / '--model'" in done.stderr) == (2, True)
    done = run_cli("imatrix", "-m", model, "-", stdin=b"\xff")
    assert (done.returncode, "stdin is not UTF-8 text" in done.stderr) == (2, True)


def test_process_output_with_a_tied_model(text: Path, tmp_path: Path) -> None:
    tied = write_tiny(tmp_path / "tied.gguf", tied=True)
    done = run_cli("imatrix", "-m", tied, "--process-output", "-c", "64", "-o", tmp_path / "i.gguf", text)
    assert done.returncode == 0
    assert "the model has no output.weight" in done.stderr
