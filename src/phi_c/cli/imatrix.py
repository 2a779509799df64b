"""`phi-c imatrix`: which weights matter, for a quantiser."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from phi_c.cli.loading import load
from phi_c.cli.options import MODEL
from phi_c.cli.windows import bar, read_text
from phi_c.errors import OptionError, OutputError, PhiError

if TYPE_CHECKING:
    from phi_c.quantize.imatrix import Imatrix

_EPILOG = """\b
Examples:
  phi-c imatrix --model Phi-3-mini-f16.gguf calibration.txt -o imatrix.gguf
  phi-c imatrix --model Phi-3-mini-f16.gguf --in-file imatrix.gguf --from-chunk 120 calibration.txt
  phi-c imatrix --in-file code.gguf --in-file prose.dat -o both.gguf     # adds them up, runs nothing
"""


@click.command("imatrix", epilog=_EPILOG)
@click.argument("text_file", required=False)
@click.option(
    "--output", "-o", default="imatrix.gguf", show_default=True, metavar="FILE", help="Where to write it, as GGUF."
)
@click.option(
    "--ctx", "n_ctx", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Tokens of a chunk."
)
@click.option("--chunks", "n_chunks", type=click.IntRange(1), metavar="N", help="Chunks at most.  [default: all]")
@click.option(
    "--from-chunk",
    "first_chunk",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Leave out N.",
)
@click.option("--process-output", is_flag=True, help="Of output.weight as well, where the model has one.")
@click.option("--parse-special", is_flag=True, help="Read <|end|> and the like as special tokens.")
@click.option(
    "--in-file", "in_files", multiple=True, metavar="FILE", help="Add to this one, GGUF or .dat; may be repeated."
)
@click.option(
    "--output-frequency",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    metavar="N",
    help="Write FILE after every N chunks, and at the end.",
)
@click.option("--save-frequency", type=click.IntRange(1), metavar="N", help="Keep FILE.at_N, .at_2N, ... as well.")
@click.option("--threads", "-t", "n_threads", type=int, metavar="N", help="Threads.  [default: physical cores]")
@click.option("--n-batch", type=int, default=512, show_default=True, metavar="N", help="Tokens at a time.")
@click.option("--tokenizer", type=click.Path(), metavar="FILE", help="A tokenizer.json instead of the model's own.")
@MODEL
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
    model: str,
    n_threads: int | None,
    n_batch: int,
    tokenizer: str | None,
) -> int:
    """Run TEXT_FILE through MODEL and write how strongly each column of its matrices is fed: an importance matrix,
    as llama.cpp's quantiser and ours read it. TEXT_FILE - reads stdin; without one the files of --in-file are added up.

    Ctrl-C writes the chunks that are done (exit code 130); --in-file and --from-chunk go on from there.
    """
    if text_file is None and not in_files:
        raise click.UsageError("no TEXT_FILE: give one, - to read it from stdin, or files to add up with --in-file")
    target = Path(output)
    _check_writable(target)
    text = None if text_file is None else read_text(text_file)
    from phi_c.quantize.imatrix import Imatrix  # noqa: PLC0415 - with the next: `--help` does without

    imatrix = Imatrix(n_ctx)
    for name in in_files:
        _merge(imatrix, Path(name), n_ctx)
    if text is None:
        imatrix.save(target)
        _report(imatrix, target)
        return 0
    from phi_c.quantize.calibration import collect_imatrix  # noqa: PLC0415

    imatrix.datasets.append("stdin" if text_file == "-" else str(text_file))
    n_before = imatrix.n_chunks
    with load(model, n_ctx=n_ctx, n_threads=n_threads, n_batch=n_batch, tokenizer=tokenizer) as llm:
        of = 0

        def progress(n: int, n_all: int) -> None:
            nonlocal of
            of = n_all
            show(n, n_all)
            if n and n < n_all and n % output_frequency == 0:
                imatrix.save(target)
            if n and save_frequency is not None and n % save_frequency == 0:
                imatrix.save(target.with_name(f"{target.name}.at_{n_before + n}"))

        try:
            with bar("chunks") as show:
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
            done = imatrix.n_chunks - n_before  # progress may not have been told of the last one
            if not done:
                click.echo("phi-c: interrupted before the first chunk was done: nothing was written", err=True)
                return 130
            imatrix.save(target)
            click.echo(
                f"phi-c: interrupted: {target} holds {done} of {of} chunks; "
                f"--in-file {target} --from-chunk {first_chunk + done} goes on",
                err=True,
            )
            return 130
    if process_output and "output.weight" not in imatrix.entries:
        click.echo("phi-c: the model has no output.weight, its embedding serves as output", err=True)
    imatrix.save(target)
    _report(imatrix, target)
    return 0


def _check_writable(target: Path) -> None:
    """Fail before an hour's work, not after it."""
    folder = target.parent
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "it is a folder" if target.is_dir() else f"{folder} is no folder that can be written"
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
