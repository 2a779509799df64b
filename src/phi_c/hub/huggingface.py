"""Models on the Hugging Face hub, through its own client with its cache and its environment variables."""

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
_PATTERN = re.compile(rf"hf:(?P<repo>{_NAME}/{_NAME})/(?P<file>[^@]+)(?:@(?P<revision>[^@]+))?")
_FOLDER = re.compile(rf"hf:(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^@]+))?")
_ANSWER_SECONDS = 10
_EXAMPLE = "hf:microsoft/Phi-3-mini-4k-instruct-gguf/Phi-3-mini-4k-instruct-q4.gguf"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, at a revision: branch, tag or commit."""

    repo: str
    file: str
    revision: str | None = None


class HubUnreachableError(DownloadError):
    """The hub cannot be reached, or must not be asked."""


def parse(source: str) -> HubFile:
    """Return the parts of hf:owner/repo/file[@revision]; raises OptionError."""
    match = _PATTERN.fullmatch(source)
    if match is None or ".." in match["file"].split("/"):
        raise OptionError(f"{source!r} is no source, expected hf:owner/repo/file.gguf[@revision], such as {_EXAMPLE}")
    return HubFile(match["repo"], match["file"], match["revision"])


def find(wanted: HubFile) -> Path | None:
    """Return the file if it is in the client's cache, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - half a second that local paths do without

    found = try_to_load_from_cache(wanted.repo, wanted.file, revision=wanted.revision)
    return Path(found) if isinstance(found, str) else None


def fetch(wanted: HubFile, *, progress: bool) -> Path:
    """Return the file, downloading what is missing or newer on the hub; an interrupted download goes on.

    Raises HubUnreachableError, DownloadError, ModelNotFoundError, CacheError.
    """
    reason = _unreachable()
    if reason is None:
        return _download(wanted, progress=progress)
    found = find(wanted)
    if found is None:
        raise HubUnreachableError(f"the Hugging Face hub cannot be reached for {wanted.repo}/{wanted.file}: {reason}")
    return found


def fetch_folder(source: str, patterns: Sequence[str], *, progress: bool) -> Path:
    """Return the folder with those files of hf:owner/repo[@revision] whose names match, as `fetch` does for one.

    What the hub has is asked first; when it cannot be reached, what the cache has is taken as it is.
    """
    import huggingface_hub  # noqa: PLC0415

    match = _FOLDER.fullmatch(source)
    if match is None:
        raise OptionError(f"{source!r} is no repository, expected hf:owner/repo[@revision]")
    repo, revision = match["repo"], match["revision"]
    where = f"{repo}@{revision}" if revision else repo
    reason = _unreachable()
    if reason is not None:
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    repo, revision=revision, allow_patterns=list(patterns), local_files_only=True
                )
            )
        except Exception:  # the client's kinds for what is not in its cache, which differ between its versions
            raise HubUnreachableError(
                f"the Hugging Face hub cannot be reached for {where}, which the cache lacks: {reason}"
            ) from None
    with _client(HubFile(repo, "", revision), where, progress=progress):
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        names = [file.rfilename for file in info.siblings or ()]
        chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        for name in chosen:
            _fetch_blob(HubFile(repo, name, info.sha))
        # Blobs that are there are linked into the snapshot, and the revision is noted for when the hub is out of reach.
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=chosen))


def _download(wanted: HubFile, *, progress: bool) -> Path:
    import huggingface_hub  # noqa: PLC0415

    where = f"{wanted.repo}/{wanted.file}" + (f"@{wanted.revision}" if wanted.revision else "")
    with _client(wanted, where, progress=progress):
        _fetch_blob(wanted)
        return Path(huggingface_hub.hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision))


@contextlib.contextmanager
def _client(wanted: HubFile, where: str, *, progress: bool) -> Iterator[None]:
    """Set the client's progress bars, and turn what it raises into errors of our own."""
    from huggingface_hub import errors  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars  # noqa: PLC0415

    (enable_progress_bars if progress else disable_progress_bars)()
    # What went wrong is said once, by us.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    except DownloadError:
        raise
    except errors.GatedRepoError:
        raise DownloadError(f"{wanted.repo} is gated: accept its terms on the hub and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFoundError(f"the hub has no repository {wanted.repo}, or it is private: set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ModelNotFoundError(f"{wanted.repo} has no revision {wanted.revision!r}") from None
    except errors.LocalEntryNotFoundError as error:
        reason = _first_cause(error)
        raise HubUnreachableError(f"the Hugging Face hub cannot be reached for {where}: {reason}") from None
    except errors.EntryNotFoundError:
        raise ModelNotFoundError(f"{wanted.repo} has no file {wanted.file!r}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise DownloadError(
                f"the hub refuses {where} ({status}): set HF_TOKEN to a token that may read it"
            ) from None
        raise DownloadError(f"the hub answers {status} for {where}") from None
    except errors.HFValidationError as error:
        raise OptionError(f"{wanted.repo} is no repository name: {_line(error)}") from None
    except OSError as error:
        if error.errno is not None:
            raise CacheError(
                f"the hub's cache cannot be written: {error.strerror}; HF_HOME names another folder"
            ) from None
        raise HubUnreachableError(f"the Hugging Face hub cannot be reached for {where}: {_line(error)}") from None
    except Exception as error:  # the HTTP library's own kinds, which change with the client's version
        raise DownloadError(
            f"{where} could not be downloaded: {_line(error)}; the next try goes on from here"
        ) from None


def _fetch_blob(wanted: HubFile) -> None:
    """Bring a file's content into the client's cache, going on where an interrupted download stopped.

    The client itself begins anew (since its pull request 4228). It takes a blob that is there as its own.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url  # noqa: PLC0415
    from huggingface_hub.file_download import http_get, repo_folder_name  # noqa: PLC0415
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # noqa: PLC0415

    url = hf_hub_url(wanted.repo, wanted.file, revision=wanted.revision)
    metadata = get_hf_file_metadata(url)
    if metadata.etag is None or metadata.size is None:
        return
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=wanted.repo, repo_type="model") / "blobs"
    blob, partial = folder / metadata.etag, folder / f"{metadata.etag}.phi-c.incomplete"
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / f"{metadata.etag}.phi-c.lock"):
        if blob.exists():
            return
        with partial.open("ab") as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=metadata.size,
                displayed_filename=Path(wanted.file).name,
            )
        _check_digest(partial, metadata.etag)
        partial.replace(blob)


def _check_digest(path: Path, etag: str) -> None:
    """Compare a large file's sha256, which is its etag on the hub; raises DownloadError and removes the file."""
    if re.fullmatch(r"[0-9a-f]{64}", etag) is None:
        return  # a small file: its etag is a git hash
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != etag:
        path.unlink()
        raise DownloadError(f"what was downloaded has the wrong sha256, {digest.hexdigest()}: try again")


def cached_files() -> Iterator[tuple[str, Path, int]]:
    """Yield source, path and size of the GGUF files in the client's cache; raises nothing."""
    from huggingface_hub import constants  # noqa: PLC0415

    for path in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*/snapshots/*/**/*.gguf")):
        folder = next(parent for parent in path.parents if parent.parent.name == "snapshots")
        repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        if path.exists():
            yield f"hf:{repo}/{path.relative_to(folder).as_posix()}", path, path.stat().st_size


def _unreachable() -> str | None:
    """Return why the hub does not answer, None if it does: the client itself would try for half a minute."""
    from huggingface_hub import constants, get_session  # noqa: PLC0415

    try:
        get_session().head(constants.ENDPOINT, timeout=_ANSWER_SECONDS)
    except Exception as error:  # the HTTP library's own kinds, and OfflineModeIsEnabled
        return _first_cause(error)
    return None


def _first_cause(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return _line(cause)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
