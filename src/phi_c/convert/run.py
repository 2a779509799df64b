"""`convert`: a Hugging Face folder or repository to a GGUF file."""

import os
from pathlib import Path

from phi_c import hub
from phi_c.convert.hf_folder import FILES, open_folder
from phi_c.convert.plan import make_plan
from phi_c.convert.values import OUT_TYPES
from phi_c.convert.vocabulary import read_tokenizer
from phi_c.convert.write import Progress, write_gguf
from phi_c.errors import OptionError

OUTTYPES = ("auto", *OUT_TYPES)


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    outtype: str = "auto",
    force: bool = False,
    show_download: bool = False,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Convert a Hugging Face model to a GGUF file and return the file's path.

    source: folder with config.json and safetensors files, or hf:owner/repo[@revision].
    output: path of the GGUF file; None: MODEL-TYPE.gguf in the current folder.
    outtype: type of the matrices, f32, f16 or bf16; auto: as stored. Vectors and routers are always float32.
    force: replace an existing file.
    show_download: show progress bars of downloads on stderr.
    progress: called with (bytes written, bytes in total).

    Raises ModelNotFoundError, DownloadError, ModelFileError, UnsupportedModelError, OutputError, OptionError.
    """
    if outtype not in OUTTYPES:
        raise OptionError(f"outtype is {outtype!r}, expected one of {', '.join(OUTTYPES)}")
    if output is not None:
        _refuse_existing(Path(output), force)  # before the download
    folder = open_folder(hub.resolve_folder(source, FILES, progress=show_download))
    plan = make_plan(folder, OUT_TYPES.get(outtype))
    is_repo = isinstance(source, str) and source.startswith("hf:")
    name = str(source).partition("@")[0].rpartition("/")[2] if is_repo else folder.path.resolve().name
    plan.metadata["general.name"] = name
    path = Path(output) if output is not None else Path(f"{name}-{plan.targets[0].out_type.lower()}.gguf")
    _refuse_existing(path, force)
    tokenizer = read_tokenizer(folder.path, plan.architecture.name, plan.n_vocab)
    write_gguf(path, plan, plan.metadata | tokenizer, progress)
    return path


def _refuse_existing(path: Path, force: bool) -> None:
    if path.is_dir():
        raise OptionError(f"{path} is a folder, expected a file name")
    if path.exists() and not force:
        raise OptionError(f"{path} already exists: use --force to replace it")
