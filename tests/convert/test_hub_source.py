"""`phi-c convert hf:owner/repo` against a fake Hugging Face Hub."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hf_files import shard, write_folder

from cli.run_cli import command
from hub.hub_server import COMMIT, FakeHub
from phi_c import hub
from phi_c.convert.hf_folder import FILES
from phi_c.convert.run import convert
from phi_c.errors import ModelNotFoundError, OptionError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "tiny-model")
    shard(folder)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FakeHub]:
    files = {f"owner/tiny-model/{file.name}": file.read_bytes() for file in folder.iterdir()}
    extra = {"README.md": b"read me", "consolidated.safetensors": b"x" * 1000, "onnx/model.onnx": b"x"}
    files |= {f"owner/tiny-model/{name}": content for name, content in extra.items()}
    files["owner/gated/config.json"] = b"{}"
    with FakeHub(files, gated={"owner/gated"}).serve() as running:
        yield running


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    cleaned = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return {**cleaned, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", **changes}


def run(tmp_path: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return subprocess.run(
        command("convert", *arguments),
        cwd=work,
        env=environment(tmp_path, **changes),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_repository_is_downloaded_once(server: FakeHub, folder: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "hf:owner/tiny-model", HF_ENDPOINT=server.url)
    assert (done.returncode, done.stdout) == (0, "tiny-model-f32.gguf\n"), done.stderr
    requested = [path for method, path, _ in server.requests if method == "GET"]
    fetched = {path.rpartition("/")[2] for path in requested if "/resolve/" in path}
    assert fetched == {file.name for file in folder.iterdir()}  # and no other files
    local = convert(folder, tmp_path / "local.gguf")
    expected = (tmp_path / "work/tiny-model-f32.gguf").read_bytes()
    assert expected == local.read_bytes()
    for changes in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        offline = run(tmp_path, "hf:owner/tiny-model", "--force", **changes)
        assert (offline.returncode, offline.stdout) == (0, "tiny-model-f32.gguf\n"), offline.stderr
    pinned = run(tmp_path, f"hf:owner/tiny-model@{COMMIT}", "pinned.gguf", HF_ENDPOINT=server.url)
    assert (tmp_path / "work/pinned.gguf").read_bytes() == expected, pinned.stderr


def test_hub_errors_are_one_line(server: FakeHub, tmp_path: Path) -> None:
    for source, message in (
        ("hf:owner/nothing", "has no repository owner/nothing"),
        ("hf:owner/tiny-model@v9", "has no revision 'v9'"),
        ("hf:owner/gated", "owner/gated is gated"),
    ):
        done = run(tmp_path, source, HF_ENDPOINT=server.url)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    unreachable = run(tmp_path, "hf:owner/tiny-model", HF_ENDPOINT="http://127.0.0.1:9")
    assert "which is not cached" in unreachable.stderr
    assert unreachable.stderr.count("\n") == 1
    assert run(tmp_path, "hf:owner/tiny-model/file.gguf", HF_ENDPOINT=server.url).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGINT to a single process")
def test_interrupted_download_can_be_repeated(server: FakeHub, tmp_path: Path) -> None:
    server.stall_after = 500
    (tmp_path / "work").mkdir()
    process = subprocess.Popen(
        command("convert", "hf:owner/tiny-model"),
        cwd=tmp_path / "work",
        env=environment(tmp_path, HF_ENDPOINT=server.url),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert server.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    server.stalled.clear()
    assert process.returncode == 130, errors
    assert list((tmp_path / "work").iterdir()) == []
    assert run(tmp_path, "hf:owner/tiny-model", HF_ENDPOINT=server.url).returncode == 0


def test_invalid_sources() -> None:
    with pytest.raises(OptionError, match=r"expected hf:owner/repo\[@revision\]"):
        hub.resolve_folder("hf:owner", FILES)
    with pytest.raises(ModelNotFoundError, match="does not exist, expected a folder"):
        hub.resolve_folder("nowhere/at/all", FILES)
