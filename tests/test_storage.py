"""The cache folder, and files that appear whole or not at all."""

import os
import time
from pathlib import Path

import pytest

from phi_c.errors import CacheError, OutputError, PhiError
from phi_c.storage import atomic_write, cache_dir, remove_stale_parts


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("PHI_C_CACHE")
    assert cache_dir().is_absolute() and cache_dir().name.lower().startswith("phi-c")


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with atomic_write(path) as file:
        file.write(b"whole")
        assert path.name not in names(tmp_path)
    assert names(tmp_path) == ["b"]
    assert path.read_bytes() == b"whole"


def test_an_error_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="broken"), atomic_write(path) as file:
        file.write(b"new")
        raise ValueError("broken")
    assert (names(tmp_path), path.read_bytes()) == (["file"], b"old")


@pytest.mark.parametrize(("kind", "hint"), [(OutputError, ""), (CacheError, "; set PHI_C_CACHE to use another folder")])
def test_a_folder_that_cannot_be_made(tmp_path: Path, kind: type[CacheError | OutputError], hint: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PhiError) as caught, atomic_write(tmp_path / "file" / "below", kind):
        pass
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{tmp_path / 'file' / 'below'} cannot be written: ")
    assert str(caught.value).endswith(hint)
    assert "\n" not in str(caught.value)


def test_stale_parts_are_removed(tmp_path: Path) -> None:
    for name, age_seconds in (("old.part", 7200), ("new.part", 60), ("old.gguf", 7200)):
        (tmp_path / name).write_bytes(b"")
        modified = time.time() - age_seconds
        os.utime(tmp_path / name, (modified, modified))
    remove_stale_parts(tmp_path)
    assert names(tmp_path) == ["new.part", "old.gguf"]
