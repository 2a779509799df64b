"""Side files: the same bits as packed, packed once, never another model's, never half a file."""

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

PACKING = [tier for tier in _core.tiers() if tier != "scalar"]
TOKENS = list(range(5, 45))

needs_packing = pytest.mark.skipif(not PACKING, reason="no tier of this machine packs weights")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PHI_C_ISA", raising=False)
    return tmp_path / "cache/packed"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf")


def logits(path: Path, layout: str = "packed-cache", **options: Any) -> npt.NDArray[np.float32]:
    with phi_c.load(path, layout=layout, n_ctx=64, **options) as llm:
        return llm.logits(TOKENS)


def wrote(path: Path, **options: Any) -> bool:
    """Load with a packed-weight cache; whether it was written, and so the weights were packed."""
    with phi_c.load(path, layout="packed-cache", n_ctx=64, **options) as llm:
        return llm.packed_cache is not None


@pytest.mark.parametrize("weight_type", ["Q4_K", "Q8_0", "F16"])
@pytest.mark.parametrize("tier", _core.tiers())
def test_the_same_bits_as_packed(tmp_path: Path, cache: Path, tier: str, weight_type: str) -> None:
    path = write_tiny(tmp_path / "typed.gguf", weight_type=weight_type)
    packed = logits(path, "packed", tier=tier)
    for _ in range(2):
        assert np.array_equal(logits(path, tier=tier), packed)
    if tier == "scalar" or weight_type == "F16":  # nothing to pack, nothing to keep
        assert not cache.exists()
    else:
        (kept,) = cache.iterdir()
        assert kept.stat().st_size < path.stat().st_size + 8192


@needs_packing
def test_the_second_load_does_not_pack(path: Path, cache: Path) -> None:
    assert wrote(path)
    (kept,) = cache.iterdir()
    before = kept.stat()
    assert not wrote(path)
    assert kept.stat().st_mtime_ns == before.st_mtime_ns and kept.stat().st_ino == before.st_ino


@needs_packing
def test_a_tied_embedding(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tied.gguf", "llama", tied=True)
    packed = logits(path, "packed")
    assert np.array_equal(logits(path), packed) and np.array_equal(logits(path), packed)


@needs_packing
@pytest.mark.parametrize("damage", ["truncate", "empty", "extend", "first byte", "key", "last byte", "folder"])
def test_a_damaged_file_is_written_again(path: Path, cache: Path, damage: str) -> None:
    packed = logits(path)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    flipped = {"first byte": 0, "key": 20, "last byte": len(whole) - 1}
    if damage in flipped:
        kept.write_bytes(bytes(b ^ (i == flipped[damage]) for i, b in enumerate(whole)))
    elif damage == "folder":
        kept.unlink()
        cache.rmdir()
    else:
        kept.write_bytes({"truncate": whole[:-1000], "empty": b"", "extend": whole + b"\0"}[damage])
    assert np.array_equal(logits(path), packed)
    assert kept.read_bytes() == whole
    assert not wrote(path)


@needs_packing
def test_a_replaced_model_is_not_mixed_up(path: Path, cache: Path, tmp_path: Path) -> None:
    """Of the same sizes, and even of the same time."""
    assert wrote(path)
    before = path.stat()
    other = write_tiny(tmp_path / "other.gguf", seed=1)
    assert other.stat().st_size == before.st_size
    shutil.copyfile(other, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert np.array_equal(logits(path), logits(other, "packed"))
    assert not wrote(path)
    assert len(list(cache.iterdir())) == 1  # the old one was replaced


@needs_packing
def test_another_version_of_the_layout(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrote(path)
    monkeypatch.setattr(packed_cache, "PANEL_VERSION", _core.PANEL_VERSION + 1)
    assert wrote(path) and not wrote(path)


@needs_packing
def test_models_of_one_name_have_a_file_each(tmp_path: Path, cache: Path) -> None:
    paths = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        paths.append(write_tiny(tmp_path / str(i) / "tiny.gguf", seed=i))
    assert all(map(wrote, paths)) and not any(map(wrote, paths))
    assert len(list(cache.iterdir())) == 2


@needs_packing
def test_a_crash_leaves_nothing(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GGUFFile(path) as file:
        kept = packed_cache.PackedCache(file, [4096])

    def stop(file: Any) -> None:
        file.write(b"x" * 1000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.write(stop)
    assert list(cache.iterdir()) == []
    # A process that was killed could not clean up: its part is not taken for whole, and goes after an hour.
    part = cache / (kept.path.name + ".abc.part")
    part.write_bytes(b"x")
    assert wrote(path) and part.exists()
    (cache / next(p.name for p in cache.iterdir() if p != part)).unlink()
    hours_ago = time.time() - 7200
    os.utime(part, (hours_ago, hours_ago))
    assert wrote(path) and not part.exists()


@needs_packing
def test_two_processes(path: Path, cache: Path) -> None:
    code = (
        "import sys, phi_c\n"
        "with phi_c.load(sys.argv[1], layout='packed-cache', n_ctx=64) as llm:\n"
        "    print(llm.logits([5, 6, 7]).tobytes().hex())"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) for _ in range(2)]
    texts = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    with phi_c.load(path, n_ctx=64) as llm:
        expected = llm.logits([5, 6, 7]).tobytes().hex()
    assert {text.decode().strip() for text in texts} == {expected}
    assert len(list(cache.iterdir())) == 1


@needs_packing
def test_whoever_comes_second_writes_nothing(path: Path) -> None:
    assert wrote(path)
    with phi_c.load(path, layout="packed-cache", n_ctx=64), GGUFFile(path) as file:
        sizes = phi_c.llm.load_weights(file, phi_c.llm.read_config(file)).packed_sizes(None)

        def write(file: Any) -> None:
            raise AssertionError("a file that fits is there")

        assert packed_cache.PackedCache(file, sizes).write(write).is_file()


@needs_packing
def test_a_folder_that_cannot_be_written(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()  # a mode would not stop an administrator
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"cannot be written: .*; set PHI_C_CACHE to use another folder$"):
        logits(path)


@needs_packing
def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(CacheError, match="GiB free: set PHI_C_CACHE to use another folder, or use layout packed$"):
        logits(path)


@needs_packing
def test_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing takes memory of its own, mapping does not."""
    monkeypatch.setattr(machine, "memory_available", lambda: 200_000)
    with pytest.raises(MemoryLimitError):
        logits(path)
    monkeypatch.undo()
    monkeypatch.setenv("PHI_C_CACHE", str(path.parent / "cache"))
    assert wrote(path)
    monkeypatch.setattr(machine, "memory_available", lambda: 200_000)
    logits(path)


@needs_packing
def test_panels_of_the_wrong_size(path: Path) -> None:
    with GGUFFile(path) as file:
        config = phi_c.llm.read_config(file)
        weights = phi_c.llm.load_weights(file, config)
        with pytest.raises(ValueError, match="10 bytes of packed weights, expected"):
            _core.Model(config, weights, n_threads=1, panels=np.zeros(10, np.uint8))
        with pytest.raises(ValueError, match="no packed weights of its own"):
            _core.Model(config, weights, n_threads=1, layout="mmap").write_panels(io.BytesIO())
