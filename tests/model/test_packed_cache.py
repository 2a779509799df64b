"""The packed-weight cache: same logits as layout packed, packed once, never stale, never partial."""

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import phi_c
from phi_c import _core, machine
from phi_c.errors import CacheError, MemoryLimitError
from phi_c.gguf.reader import GGUFFile
from phi_c.model import packed_cache
from tiny_gguf import write_tiny

PACKING_TIERS = [tier for tier in _core.tiers() if tier != "scalar"]
TOKENS = list(range(5, 45))

needs_packing = pytest.mark.skipif(not PACKING_TIERS, reason="no tier that this machine supports packs weights")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PHI_C_ISA", raising=False)
    return tmp_path / "cache/packed"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf")


def logits(path: Path, layout: str = "packed-cache", **options: Any) -> npt.NDArray[np.float32]:
    with phi_c.load(path, layout=layout, n_ctx=64, **options) as llm:
        return llm.logits(TOKENS)


def load_writes_cache(path: Path, **options: Any) -> bool:
    """Load with layout packed-cache; return whether the load packed the weights and wrote the cache file."""
    with phi_c.load(path, layout="packed-cache", n_ctx=64, **options) as llm:
        return llm.packed_cache is not None


@pytest.mark.parametrize("weight_type", ["Q4_K", "Q8_0", "F16"])
@pytest.mark.parametrize("tier", _core.tiers())
def test_logits_equal_layout_packed(tmp_path: Path, cache_folder: Path, tier: str, weight_type: str) -> None:
    path = write_tiny(tmp_path / "typed.gguf", weight_type=weight_type)
    packed = logits(path, "packed", tier=tier)
    for _ in range(2):
        assert np.array_equal(logits(path, tier=tier), packed)
    if tier == "scalar" or weight_type == "F16":  # not packed, so there is nothing to cache
        assert not cache_folder.exists()
    else:
        (cache_file,) = cache_folder.iterdir()
        assert cache_file.stat().st_size < path.stat().st_size + 8192


@needs_packing
def test_second_load_does_not_pack(path: Path, cache_folder: Path) -> None:
    assert load_writes_cache(path)
    (cache_file,) = cache_folder.iterdir()
    before = cache_file.stat()
    assert not load_writes_cache(path)
    assert cache_file.stat().st_mtime_ns == before.st_mtime_ns and cache_file.stat().st_ino == before.st_ino


@needs_packing
def test_tied_embedding(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tied.gguf", "llama", tied=True)
    packed = logits(path, "packed")
    assert np.array_equal(logits(path), packed) and np.array_equal(logits(path), packed)


@needs_packing
@pytest.mark.parametrize("corruption", ["truncate", "empty", "extend", "first byte", "key", "last byte", "folder"])
def test_corrupt_file_is_rewritten(path: Path, cache_folder: Path, corruption: str) -> None:
    packed = logits(path)
    (cache_file,) = cache_folder.iterdir()
    whole = cache_file.read_bytes()
    flipped = {"first byte": 0, "key": 20, "last byte": len(whole) - 1}
    if corruption in flipped:
        cache_file.write_bytes(bytes(b ^ (i == flipped[corruption]) for i, b in enumerate(whole)))
    elif corruption == "folder":
        cache_file.unlink()
        cache_folder.rmdir()
    else:
        cache_file.write_bytes({"truncate": whole[:-1000], "empty": b"", "extend": whole + b"\0"}[corruption])
    assert np.array_equal(logits(path), packed)
    assert cache_file.read_bytes() == whole
    assert not load_writes_cache(path)


@needs_packing
def test_replaced_model_file_replaces_the_cache_file(path: Path, cache_folder: Path, tmp_path: Path) -> None:
    """The new file has the same path, size and modification time."""
    assert load_writes_cache(path)
    before = path.stat()
    other = write_tiny(tmp_path / "other.gguf", seed=1)
    assert other.stat().st_size == before.st_size
    shutil.copyfile(other, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert np.array_equal(logits(path), logits(other, "packed"))
    assert not load_writes_cache(path)
    assert len(list(cache_folder.iterdir())) == 1


@needs_packing
def test_new_panel_version_rewrites_the_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_writes_cache(path)
    monkeypatch.setattr(packed_cache, "PANEL_VERSION", _core.PANEL_VERSION + 1)
    assert load_writes_cache(path) and not load_writes_cache(path)


@needs_packing
def test_models_with_equal_file_names_have_separate_caches(tmp_path: Path, cache_folder: Path) -> None:
    paths = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        paths.append(write_tiny(tmp_path / str(i) / "tiny.gguf", seed=i))
    assert all(map(load_writes_cache, paths)) and not any(map(load_writes_cache, paths))
    assert len(list(cache_folder.iterdir())) == 2


@needs_packing
def test_interrupt_leaves_no_file(path: Path, cache_folder: Path) -> None:
    with GGUFFile(path) as file:
        packed = packed_cache.PackedCache(file, [4096])

    def interrupt(file: Any) -> None:
        file.write(b"x" * 1000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed.write(interrupt)
    assert list(cache_folder.iterdir()) == []
    # A killed process leaves a partial file. It is not used, and is deleted when it is more than an hour old.
    part = cache_folder / (packed.path.name + ".abc.part")
    part.write_bytes(b"x")
    assert load_writes_cache(path) and part.exists()
    (cache_folder / next(p.name for p in cache_folder.iterdir() if p != part)).unlink()
    hours_ago = time.time() - 7200
    os.utime(part, (hours_ago, hours_ago))
    assert load_writes_cache(path) and not part.exists()


@needs_packing
def test_two_processes_write_at_once(path: Path, cache_folder: Path) -> None:
    code = (
        "import sys, phi_c\n"
        "with phi_c.load(sys.argv[1], layout='packed-cache', n_ctx=64) as llm:\n"
        "    print(llm.logits([5, 6, 7]).tobytes().hex())"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    with phi_c.load(path, n_ctx=64) as llm:
        expected = llm.logits([5, 6, 7]).tobytes().hex()
    assert {output.decode().strip() for output in outputs} == {expected}
    assert len(list(cache_folder.iterdir())) == 1


@needs_packing
def test_existing_cache_is_not_rewritten(path: Path) -> None:
    assert load_writes_cache(path)
    with phi_c.load(path, layout="packed-cache", n_ctx=64), GGUFFile(path) as file:
        sizes = phi_c.llm.load_weights(file, phi_c.llm.read_config(file)).packed_sizes(None)

        def write(file: Any) -> None:
            raise AssertionError("the cache file exists")

        assert packed_cache.PackedCache(file, sizes).write(write).is_file()


@needs_packing
def test_folder_not_writable(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()  # file modes do not stop root
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"cannot be written: .*; set PHI_C_CACHE to use another folder$"):
        logits(path)


@needs_packing
def test_disk_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(CacheError, match="GiB free: set PHI_C_CACHE to use another folder, or use layout packed$"):
        logits(path)


@needs_packing
def test_mapping_needs_no_memory_for_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing allocates memory, mapping the cache file does not."""
    monkeypatch.setattr(machine, "memory_available", lambda: 200_000)
    with pytest.raises(MemoryLimitError):
        logits(path)
    monkeypatch.undo()
    monkeypatch.setenv("PHI_C_CACHE", str(path.parent / "cache"))
    assert load_writes_cache(path)
    monkeypatch.setattr(machine, "memory_available", lambda: 200_000)
    logits(path)


@needs_packing
def test_wrong_panel_sizes(path: Path) -> None:
    with GGUFFile(path) as file:
        config = phi_c.llm.read_config(file)
        weights = phi_c.llm.load_weights(file, config)
        with pytest.raises(ValueError, match="10 bytes of packed weights, expected"):
            _core.Model(config, weights, n_threads=1, panels=np.zeros(10, np.uint8))
        with pytest.raises(ValueError, match="no packed weights of its own"):
            _core.Model(config, weights, n_threads=1, layout="mmap").write_panels(io.BytesIO())
