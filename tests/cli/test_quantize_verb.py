"""`phi-c quantize` in its own process: output, errors, files after an interrupt."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from run_cli import command, run_cli

import gguf
from tiny_gguf import write_and_close, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", "F16", n_layers=9)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file whose quantisation takes one thread several seconds."""
    path = tmp_path_factory.mktemp("big") / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    rows = np.random.default_rng(0).normal(size=(1024, 4096)).astype(np.float16)
    for i in range(16):
        writer.add_tensor(f"blk.{i}.ffn_up.weight", rows)
    write_and_close(writer)
    return path


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_quantised_file_generates(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    done = run_cli("quantize", tiny, target, "q4_k_m", "--threads", "2")
    assert (done.returncode, done.stderr) == (0, "")
    size = target.stat().st_size
    pattern = rf"{re.escape(str(target))}: [\d.]+ MB -> {size / 1e6:.1f} MB, \d\.\d\d bits per weight, \d+\.\d s\n"
    assert re.fullmatch(pattern, done.stdout)
    generated = run_cli("generate", "--model", target, "--max-tokens", "3", "the ring")
    assert generated.returncode == 0
    again = run_cli("quantize", tiny, target, "Q4_K_M")
    assert again.returncode == 1 and again.stdout == ""
    assert again.stderr == f"phi-c: error: {target} already exists; replace it with force (--force)\n"
    quiet = run_cli("quantize", tiny, target, "Q8_0", "--force", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert file_names(tmp_path) == ["out.gguf"]


def test_dry_run_prints_types_and_size(tiny: Path, tmp_path: Path) -> None:
    done = run_cli("quantize", tiny, tmp_path / "out.gguf", "Q4_K_M", "--dry-run", "--tensor-type", "attn_k=F16")
    assert done.returncode == 0 and file_names(tmp_path) == []
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    found = [[part.strip() for part in line if part.strip()] for line in lines]
    assert ["ffn_down.weight", "F16 -> Q6_K", "0, 3, 6-8"] in found
    assert ["ffn_down.weight", "F16 -> Q4_K", "1-2, 4-5"] in found
    assert ["attn_k.weight", "F16", "0-8"] in found
    assert ["output.weight", "F16 -> Q6_K"] in found
    size = re.search(r"-> ([\d.]+) MB, ([\d.]+) bits per weight$", done.stdout.strip())
    assert size is not None
    run_cli("quantize", tiny, tmp_path / "out.gguf", "Q4_K_M", "--tensor-type", "attn_k=F16")
    assert float(size[1]) == round((tmp_path / "out.gguf").stat().st_size / 1e6, 1)


def test_options_reach_the_file(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    options = ["--output-tensor-type", "Q8_0", "--token-embedding-type", "Q5_K", "--tensor-type", r"blk\.0\.ffn=Q6_K"]
    assert run_cli("quantize", tiny, target, "Q4_0", "--pure", *options).returncode == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
    assert types.pop("output.weight") == "Q8_0" and types.pop("token_embd.weight") == "Q5_K"
    for name, kind in types.items():
        expected = "F32" if "norm" in name else "Q6_K" if name.startswith("blk.0.ffn") else "Q4_0"
        assert kind == expected, name


def test_requantising_needs_a_flag(tiny: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    run_cli("quantize", tiny, first, "Q8_0")
    refused = run_cli("quantize", first, second, "Q4_0")
    assert refused.returncode == 2
    assert re.fullmatch(r"phi-c: error: .* is already quantised to Q8_0, .*--allow-requantize.*\n", refused.stderr)
    done = run_cli("quantize", first, second, "Q4_0", "--allow-requantize")
    assert done.returncode == 0
    assert done.stderr == "phi-c: warning: 65 tensors were already quantised and have lost precision twice\n"


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["{tiny}", "{out}", "Q4_K_X"], 2, "unknown file type 'Q4_K_X', expected one of F32, F16"),
        (["{tiny}", "{out}"], 2, "Missing argument 'TYPE'"),
        (["{tiny}", "{out}", "Q4_0", "--tensor-type", "x"], 2, "expected REGEX=TYPE, such as ffn_down=Q8_0"),
        (["{tiny}", "{out}", "Q4_0", "--tensor-type", "(=Q8_0"], 2, "invalid regular expression '('"),
        (["{tiny}", "{out}", "Q4_0", "--threads", "0"], 2, "n_threads is 0, expected 1 to 1024"),
        (["{tiny}", "{out}", "Q4_0", "--no-such"], 2, "No such option"),
        (["{none}", "{out}", "Q4_0"], 1, "is neither a file nor a preset"),
        (["{cut}", "{out}", "Q4_0"], 1, "the file is truncated or corrupt"),
        (["{tiny}", "{tiny}", "Q4_0", "--force"], 1, "is the source file, expected another file name"),
    ],
)
def test_errors_are_one_line(tiny: Path, tmp_path: Path, arguments: list[str], code: int, complaint: str) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-1000])
    places = {"tiny": tiny, "cut": cut, "none": tmp_path / "none.gguf", "out": tmp_path / "out.gguf"}
    done = run_cli("quantize", *(text.format(**places) for text in arguments))
    assert done.returncode == code and done.stdout == ""
    lines = done.stderr.splitlines()
    assert complaint in lines[-1] and lines[-1].startswith("phi-c: error: ")
    assert all(line.startswith(("Usage:", "phi-c: error: ")) for line in lines)
    assert file_names(tmp_path) == ["cut.gguf"]


@pytest.fixture
def running(big: Path, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Yield a process that has written a part of out.gguf."""
    flags = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if sys.platform == "win32" else {}
    process = subprocess.Popen(
        command("quantize", big, tmp_path / "out.gguf", "Q5_K_M", "--threads", "1"), stderr=subprocess.PIPE, **flags
    )
    try:
        end = time.monotonic() + 60
        while not any(path.stat().st_size > 1 << 20 for path in tmp_path.iterdir()):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_killed_process_leaves_no_target_file(running: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    running.kill()
    running.wait(30)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C reaches the whole console, including pytest")
def test_interrupted_process_leaves_no_files(running: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130 and b"Traceback" not in errors
    assert file_names(tmp_path) == []
