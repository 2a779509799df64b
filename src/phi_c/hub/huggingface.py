"""Models on the Hugging Face hub, downloaded by its own client: its cache and its environment variables apply."""

import contextlib
import fnmatch
import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from phi_c.errors import CacheError, DownloadError, ModelNotFoundError, OptionError

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_FILE_PATTERN = re.compile(rf"hf:(?P<repo>{_NAME}/{_NAME})/(?P<file>[^@]+)(?:@(?P<revision>[^@]+))?")
_REPO_PATTERN = re.compile(rf"hf:(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^@]+))?")
_PROBE_TIMEOUT_SECONDS = 10
_EXAMPLE = "hf:microsoft/Phi-3-mini-4k-instruct-gguf/Phi-3-mini-4k-instruct-q4.gguf"


@dataclass(frozen=True)
class HubFile:
    """A file in a repository on the hub."""

    repo: str  # owner/name
    file: str  # path in the repository
    revision: str | None = None  # branch, tag or commit; None: main


class HubUnreachableError(DownloadError):
    """The hub cannot be reached, or offline mode (HF_HUB_OFFLINE) is on."""


def parse(source: str) -> HubFile:
    """Parse hf:owner/repo/file[@revision]. Raises OptionError."""
    match = _FILE_PATTERN.fullmatch(source)
    if match is None or ".." in match["file"].split("/"):
        raise OptionError(
            f"{source!r} is not a valid model source, expected hf:owner/repo/file.gguf[@revision], such as {_EXAMPLE}"
        )
    return HubFile(match["repo"], match["file"], match["revision"])


def find_cached(file: HubFile) -> Path | None:
    """Return the file's path in the client's cache, None if it is not there; needs no network."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - slow import (0.5 s), not for local paths

    path = try_to_load_from_cache(file.repo, file.file, revision=file.revision)
    return Path(path) if isinstance(path, str) else None


def fetch(file: HubFile, *, progress: bool) -> Path:
    """Return the file, downloading it if it is not cached or the hub has a newer version; resumes broken downloads.

    If the hub cannot be reached, a cached file is returned as it is.

    Raises HubUnreachableError, DownloadError, ModelNotFoundError, CacheError.
    """
    reason = _probe_error()
    if reason is None:
        return _download(file, progress=progress)
    path = find_cached(file)
    if path is None:
        raise HubUnreachableError(f"the Hugging Face hub cannot be reached for {file.repo}/{file.file}: {reason}")
    return path


def fetch_folder(source: str, patterns: Sequence[str], *, progress: bool) -> Path:
    """Return the folder of hf:owner/repo[@revision], downloading the files whose names match `patterns`.

    If the hub cannot be reached, the cached snapshot is returned as it is.

    Raises what `fetch` raises; OptionError for a malformed source.
    """
    import huggingface_hub  # noqa: PLC0415

    match = _REPO_PATTERN.fullmatch(source)
    if match is None:
        raise OptionError(f"{source!r} is not a repository, expected hf:owner/repo[@revision]")
    repo, revision = match["repo"], match["revision"]
    where = f"{repo}@{revision}" if revision else repo
    reason = _probe_error()
    if reason is not None:
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    repo, revision=revision, allow_patterns=list(patterns), local_files_only=True
                )
            )
        except Exception:  # which exception means "not cached" depends on the client's version
            raise HubUnreachableError(
                f"the Hugging Face hub cannot be reached for {where}, which is not cached: {reason}"
            ) from None
    with _client(HubFile(repo, "", revision), where, progress=progress):
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        names = [file.rfilename for file in info.siblings or ()]
        chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        for name in chosen:
            _fetch_blob(HubFile(repo, name, info.sha))
        # Links the blobs into a snapshot and records the revision, which offline use needs.
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=chosen))


def _download(file: HubFile, *, progress: bool) -> Path:
    import huggingface_hub  # noqa: PLC0415

    where = f"{file.repo}/{file.file}" + (f"@{file.revision}" if file.revision else "")
    with _client(file, where, progress=progress):
        _fetch_blob(file)
        return Path(huggingface_hub.hf_hub_download(file.repo, file.file, revision=file.revision))


@contextlib.contextmanager
def _client(file: HubFile, where: str, *, progress: bool) -> Iterator[None]:
    """Set the client's progress bars, and translate its exceptions into phi-c's. where: names the download in them."""
    from huggingface_hub import errors  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars  # noqa: PLC0415

    (enable_progress_bars if progress else disable_progress_bars)()
    # Our exception reports the failure; without this the client's log would report it again.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    except DownloadError:
        raise
    except errors.GatedRepoError:
        raise DownloadError(f"{file.repo} is gated: accept its terms on the hub and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFoundError(f"the hub has no repository {file.repo}, or it is private: set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ModelNotFoundError(f"{file.repo} has no revision {file.revision!r}") from None
    except errors.LocalEntryNotFoundError as error:
        reason = _root_cause(error)
        raise HubUnreachableError(f"the Hugging Face hub cannot be reached for {where}: {reason}") from None
    except errors.EntryNotFoundError:
        raise ModelNotFoundError(f"{file.repo} has no file {file.file!r}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise DownloadError(
                f"the hub denies access to {where} (HTTP {status}): set HF_TOKEN to a token with read access"
            ) from None
        raise DownloadError(f"the hub returned HTTP {status} for {where}") from None
    except errors.HFValidationError as error:
        raise OptionError(f"{file.repo} is not a valid repository name: {_one_line(error)}") from None
    except OSError as error:
        if error.errno is not None:
            raise CacheError(
                f"the Hugging Face cache cannot be written: {error.strerror}; set HF_HOME to use another folder"
            ) from None
        raise HubUnreachableError(f"the Hugging Face hub cannot be reached for {where}: {_one_line(error)}") from None
    except Exception as error:  # exceptions of the HTTP library, which depends on the client's version
        raise DownloadError(
            f"{where} could not be downloaded: {_one_line(error)}; try again to resume the download"
        ) from None


def _fetch_blob(file: HubFile) -> None:
    """Download a file's content into the client's cache, resuming an interrupted download.

    The client itself restarts from zero (since its pull request 4228), but uses a blob that is already in its cache.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url  # noqa: PLC0415
    from huggingface_hub.file_download import http_get, repo_folder_name  # noqa: PLC0415
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # noqa: PLC0415

    url = hf_hub_url(file.repo, file.file, revision=file.revision)
    metadata = get_hf_file_metadata(url)
    if metadata.etag is None or metadata.size is None:
        return
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=file.repo, repo_type="model") / "blobs"
    blob, partial = folder / metadata.etag, folder / f"{metadata.etag}.phi-c.incomplete"
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / f"{metadata.etag}.phi-c.lock"):
        if blob.exists():
            return
        with partial.open("ab") as out:
            http_get(
                url,
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(),
                expected_size=metadata.size,
                displayed_filename=Path(file.file).name,
            )
        _check_digest(partial, metadata.etag)
        partial.replace(blob)


def _check_digest(path: Path, etag: str) -> None:
    """Check a large file's sha256, its etag on the hub. If it differs, delete the file and raise DownloadError."""
    if re.fullmatch(r"[0-9a-f]{64}", etag) is None:
        return  # a small file: its etag is a git hash
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != etag:
        path.unlink()
        raise DownloadError(f"the downloaded file has the wrong sha256, {digest.hexdigest()}: try again")


def cached_files() -> Iterator[tuple[str, Path, int]]:
    """Yield (source, path, size in bytes) of the GGUF files in the client's cache."""
    from huggingface_hub import constants  # noqa: PLC0415

    for path in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*/snapshots/*/**/*.gguf")):
        folder = next(parent for parent in path.parents if parent.parent.name == "snapshots")
        repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        if path.exists():
            yield f"hf:{repo}/{path.relative_to(folder).as_posix()}", path, path.stat().st_size


def _probe_error() -> str | None:
    """Return why the hub cannot be reached, None if it can. Faster than the client, which retries for 30 seconds."""
    from huggingface_hub import constants, get_session  # noqa: PLC0415

    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_TIMEOUT_SECONDS)
    except Exception as error:  # exceptions of the HTTP library, and OfflineModeIsEnabled
        return _root_cause(error)
    return None


def _root_cause(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return _one_line(cause)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
