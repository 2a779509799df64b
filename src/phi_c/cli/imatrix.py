"""`phi-c imatrix`: computes an importance matrix for quantisation."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.inputs import read_text
from phi_c.cli.loading import load
from phi_c.cli.progress import window_bar
from phi_c.errors import OptionError, OutputError, PhiError

if TYPE_CHECKING:
    from phi_c.quantize.imatrix import Imatrix

_EPILOG = """\b
Examples:
  phi-c imatrix -m Phi-3-mini-f16.gguf calibration.txt -o imatrix.gguf
  phi-c imatrix -m Phi-3-mini-f16.gguf --in-file imatrix.gguf --from-chunk 120 \\
      calibration.txt
  phi-c imatrix --in-file code.gguf --in-file prose.dat -o merged.gguf
"""


@cloup.command("imatrix", epilog=_EPILOG)
@cloup.argument("text_file", required=False, help="Calibration text; '-' reads stdin.")
@opt.loading_options(
    opt.model_option(),
    opt.ctx_size_option("Chunk size in tokens.", minimum=1, default=512, show_default=True),
    more=(opt.tokenizer(),),
)
@cloup.option_group(
    "Calibration options",
    opt.chunks("Maximum number of chunks to run.", "n_chunks"),
    opt.count_option(
        "--from-chunk",
        "first_chunk",
        minimum=0,
        default=0,
        show_default=True,
        help="Number of chunks to skip at the beginning.",
    ),
    cloup.option("--process-output", is_flag=True, help="Include output.weight, if the model has one."),
    opt.parse_special(),
    cloup.option(
        "--in-file",
        "in_files",
        multiple=True,
        metavar="FILE",
        help="Importance matrix to add to, GGUF or .dat. Can be repeated.",
    ),
)
@cloup.option_group(
    "Output options",
    cloup.option(
        "-o", "--output", default="imatrix.gguf", show_default=True, metavar="FILE", help="GGUF file to write."
    ),
    opt.count_option(
        "--output-frequency",
        default=10,
        show_default=True,
        help="Number of chunks between intermediate writes of FILE.",
    ),
    opt.count_option(
        "--save-frequency",
        help="Number of chunks between copies, saved as FILE.at_N, FILE.at_2N and so on.  [default: no copies]",
    ),
)
def command(
    text_file: str | None,
    output: str,
    n_ctx: int,
    n_chunks: int | None,
    first_chunk: int,
    process_output: bool,
    parse_special: bool,
    in_files: tuple[str, ...],
    output_frequency: int,
    save_frequency: int | None,
    model: str | None,
    **loading: Any,
) -> int:
    """Compute an importance matrix: run TEXT_FILE through a model and sum the squared inputs of each matrix by column.

    `phi-c quantize --imatrix` and llama.cpp read the result. Without TEXT_FILE, the files of --in-file are merged.
    Ctrl-C writes the chunks that are done and exits with code 130; --in-file and --from-chunk continue from there.
    """
    if text_file is None and not in_files:
        raise click.UsageError("missing TEXT_FILE ('-' reads stdin), or files to merge with --in-file")
    if text_file is not None and model is None:
        raise click.UsageError("missing option '-m' / '--model': the model to run TEXT_FILE through")
    target = Path(output)
    _check_writable(target)
    text = None if text_file is None else read_text(text_file)
    from phi_c.quantize.imatrix import Imatrix  # noqa: PLC0415 - with the next: not needed for `--help`

    imatrix = Imatrix(n_ctx)
    for name in in_files:
        _merge(imatrix, Path(name), n_ctx)
    if text is None or model is None:
        imatrix.save(target)
        _report(imatrix, target)
        return 0
    from phi_c.quantize.calibration import collect_imatrix  # noqa: PLC0415

    imatrix.datasets.append("stdin" if text_file == "-" else str(text_file))
    n_before = imatrix.n_chunks
    with load(model, n_ctx=n_ctx, **loading) as llm:
        n_total = 0

        def progress(n_done: int, n_all: int) -> None:
            nonlocal n_total
            n_total = n_all
            show(n_done, n_all)
            if n_done and n_done < n_all and n_done % output_frequency == 0:
                imatrix.save(target)
            if n_done and save_frequency is not None and n_done % save_frequency == 0:
                imatrix.save(target.with_name(f"{target.name}.at_{n_before + n_done}"))

        try:
            with window_bar("chunks") as show:
                collect_imatrix(
                    llm,
                    text,
                    n_ctx=n_ctx,
                    first_chunk=first_chunk,
                    n_chunks=n_chunks,
                    process_output=process_output,
                    parse_special=parse_special,
                    into=imatrix,
                    progress=progress,
                )
        except KeyboardInterrupt:
            n_done = imatrix.n_chunks - n_before  # the interrupt may have come before the last call of progress
            if not n_done:
                click.echo("phi-c: interrupted before the first chunk was done: nothing was written", err=True)
                return 130
            imatrix.save(target)
            click.echo(
                f"phi-c: interrupted: wrote {n_done} of {n_total} chunks to {target}; "
                f"continue with --in-file {target} --from-chunk {first_chunk + n_done}",
                err=True,
            )
            return 130
    if process_output and "output.weight" not in imatrix.entries:
        click.echo("phi-c: the model has no output.weight: its embedding is tied to the output", err=True)
    imatrix.save(target)
    _report(imatrix, target)
    return 0


def _check_writable(target: Path) -> None:
    """Raise OutputError for a target that cannot be written, before the work starts."""
    folder = target.parent
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "it is a folder" if target.is_dir() else f"{folder} is not a writable folder"
        raise OutputError(f"{target} cannot be written: {reason}")


def _merge(imatrix: "Imatrix", path: Path, n_ctx: int) -> None:
    from phi_c.quantize.imatrix import load_imatrix  # noqa: PLC0415

    try:
        imatrix.merge(load_imatrix(path, n_ctx))
    except ValueError as error:
        if isinstance(error, PhiError):
            raise
        raise OptionError(f"{path} cannot be added to the files before it: {error}") from None


def _report(imatrix: "Imatrix", target: Path) -> None:
    click.echo(
        f"{target}: {imatrix.n_chunks} chunks of {imatrix.chunk_size} tokens, {len(imatrix.entries)} matrices", err=True
    )
