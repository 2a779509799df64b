"""Finds and removes what phi-c keeps on disk: models, packed weights, prefix cache, random models, tuning."""

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phi_c import hub
from phi_c.errors import CacheError, ModelNotFoundError
from phi_c.hub.presets import PRESETS
from phi_c.storage import cache_dir

if TYPE_CHECKING:
    from huggingface_hub import CachedFileInfo, CachedRepoInfo, HFCacheInfo

ALL = "all"
# Folders of cache_dir() by name, and what is in them.
CACHES = {
    "packed": "packed-weight cache",
    "prefix": "prefix cache",
    "random": "random models of `phi-c bench`",
    "tuning": "tuning profiles",
}


@dataclass(frozen=True)
class StoredFile:
    """A file that can be removed."""

    path: Path
    n_bytes: int  # of the content, for a link from the hub's snapshots to its blobs
    is_in_hub_cache: bool = False  # the cache of the Hugging Face client, not phi-c's


def cache_sizes() -> dict[str, int]:
    """Return the size in bytes of each of CACHES."""
    return {name: sum(file.n_bytes for file in _files_below(cache_dir() / name)) for name in CACHES}


def find(names: Sequence[str]) -> list[StoredFile]:
    """Return the files of all names, each file once.

    names: presets, sources as `hub.cached` gives them, names of CACHES, or "all" for all models and CACHES. A cache may
    have no files. Raises ModelNotFoundError for another name and for a model that is not downloaded.
    """
    models = hub.cached()
    found: dict[Path, StoredFile] = {}
    for name in names:
        if name == ALL:
            files = [_stored(model) for model in models]
            files += [file for cache in CACHES for file in _files_below(cache_dir() / cache)]
        elif name in CACHES:
            files = list(_files_below(cache_dir() / name))
        else:
            source = PRESETS[name].source if name in PRESETS else name
            files = [_stored(model) for model in models if model.source == source]
            if not files:
                raise ModelNotFoundError(
                    f"{name!r} is not a downloaded model (`phi-c list` shows them), expected a preset, a source, "
                    f"{', '.join(CACHES)} or {ALL}"
                )
        found |= {file.path: file for file in files}
    return list(found.values())


def remove(files: Collection[StoredFile]) -> None:
    """Delete files that `find` returned, and folders of phi-c's cache that become empty.

    Models of the Hugging Face hub are removed through its client, so that its cache stays consistent. A symbolic link
    is deleted itself, never what it points to outside the cache. Raises CacheError for a file in a folder that a
    symbolic link takes out of the cache, before anything is deleted, and for one that cannot be deleted.
    """
    root = cache_dir()
    own = [file.path for file in files if not file.is_in_hub_cache]
    for path in own:
        if not path.parent.resolve().is_relative_to(root.resolve()):
            raise CacheError(f"{path.parent} is outside the cache folder {root}: delete {path.name} there manually")
    try:
        for path in own:
            path.unlink(missing_ok=True)
            _remove_empty_folders(path.parent, root)
        _remove_from_hub({_real_name(file.path) for file in files if file.is_in_hub_cache})
    except OSError as error:
        raise CacheError(f"{error.filename or 'the cache'} cannot be deleted: {error.strerror or error}") from None
    for file in files:
        if os.path.lexists(file.path):
            raise CacheError(f"{file.path} could not be deleted")


def _stored(model: hub.CachedModel) -> StoredFile:
    return StoredFile(model.path, model.n_bytes, is_in_hub_cache=model.source.startswith("hf:"))


def _files_below(folder: Path) -> Iterator[StoredFile]:
    """Yield the files and symbolic links below a folder; links are not followed."""
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in sorted([*names, *links]):
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                yield StoredFile(Path(parent, name), Path(parent, name).lstat().st_size)


def _remove_empty_folders(folder: Path, root: Path) -> None:
    """Delete a folder and its parents below root as far as they are empty."""
    with contextlib.suppress(OSError):  # not empty
        while folder != root:
            folder.rmdir()
            folder = folder.parent


def _real_name(path: Path) -> Path:
    """Return the path without symbolic links in its folders: the client resolves its cache folder, `hub` does not."""
    return path.parent.resolve() / path.name


def _remove_from_hub(paths: Collection[Path]) -> None:
    """Delete files of the hub client's cache; paths: in its snapshots, without symbolic links in their folders."""
    if not paths:
        return
    from huggingface_hub import scan_cache_dir  # noqa: PLC0415 - half a second

    info = scan_cache_dir()
    for repo in info.repos:
        _remove_from_repo(info, repo, paths)


def _remove_from_repo(info: "HFCacheInfo", repo: "CachedRepoInfo", paths: Collection[Path]) -> None:
    """Delete whole revisions where all of their files were chosen; else only the chosen files."""
    revisions: list[str] = []
    single: list[CachedFileInfo] = []
    kept_blobs: set[Path] = set()
    for revision in repo.revisions:
        chosen = [file for file in revision.files if _real_name(file.file_path) in paths]
        is_inside = all(file.blob_path.is_relative_to(repo.repo_path) for file in revision.files)
        if chosen and len(chosen) == len(revision.files) and is_inside:
            revisions.append(revision.commit_hash)
            continue
        single += chosen
        kept_blobs |= {file.blob_path for file in revision.files if file not in chosen}
    for file in single:
        file.file_path.unlink(missing_ok=True)
        if file.blob_path not in kept_blobs and file.blob_path.is_relative_to(repo.repo_path):
            file.blob_path.unlink(missing_ok=True)
    if revisions:
        # Only this repository: two of them with the same commit would be confused.
        dataclasses.replace(info, repos=frozenset({repo})).delete_revisions(*revisions).execute()
