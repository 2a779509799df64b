"""`phi-c quantize`: fewer bits a weight."""

import re
import sys
from typing import TYPE_CHECKING

import click

from phi_c.errors import OptionError

if TYPE_CHECKING:
    from phi_c.quantize.plan import QuantizePlan

_EPILOG = """\b
Types, most bits first: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S
Q4_1 Q4_0 Q3_K_L Q3_K_M Q3_K_S Q2_K

\b
Examples:
  phi-c quantize Phi-3.5-mini-F16.gguf Phi-3.5-mini-Q4_K_M.gguf Q4_K_M
  phi-c quantize model-F32.gguf model-Q4_K_M.gguf Q4_K_M --imatrix imatrix.gguf
  phi-c quantize model-F16.gguf model-Q6_K.gguf Q6_K --tensor-type ffn_down=Q8_0 --dry-run
"""


@click.command("quantize", epilog=_EPILOG)
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=click.Path())
@click.argument("file_type", metavar="TYPE")
@click.option("--imatrix", type=click.Path(), metavar="FILE", help="Weigh errors by this importance matrix.")
@click.option("--output-tensor-type", "output_type", metavar="TYPE", help="Type of the output matrix.")
@click.option("--token-embedding-type", "embedding_type", metavar="TYPE", help="Type of the embedding.")
@click.option(
    "--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", help="Type of tensors whose names match."
)
@click.option("--pure", is_flag=True, help="One type for all matrices, no mix.")
@click.option("--allow-requantize", is_flag=True, help="Take weights that are quantised already; they lose again.")
@click.option("--threads", "-t", "n_threads", type=int, metavar="N", help="Threads.  [default: physical cores]")
@click.option("--force", "-f", is_flag=True, help="Replace OUT.")
@click.option("--dry-run", is_flag=True, help="Print the mix and the size, write nothing.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar, no summary.")
def command(
    source: str,
    target: str,
    file_type: str,
    imatrix: str | None,
    output_type: str | None,
    embedding_type: str | None,
    tensor_types: tuple[str, ...],
    pure: bool,
    allow_requantize: bool,
    n_threads: int | None,
    force: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Write the model file IN as OUT with its matrices in TYPE: a mix of types, chosen as llama.cpp does.

    IN is a path or anything else that names a model. Its weights should be F32, F16 or BF16. OUT appears when it is
    whole.
    """
    from phi_c import hub  # noqa: PLC0415 - with the next: `--help` does without
    from phi_c.gguf.reader import GGUFFile  # noqa: PLC0415
    from phi_c.quantize.mix import make_mix  # noqa: PLC0415
    from phi_c.quantize.plan import check_plan, make_plan, read_importance  # noqa: PLC0415
    from phi_c.quantize.run import quantize_model  # noqa: PLC0415

    overrides = [_override(text) for text in tensor_types]
    shown = not quiet and sys.stderr.isatty()
    path = hub.resolve(source, progress=shown)
    if dry_run:
        mix = make_mix(file_type, output_type, embedding_type, overrides, pure=pure)
        importance = read_importance(imatrix) if imatrix is not None else None
        with GGUFFile(path) as file:
            plan = make_plan(file, mix, importance)
            check_plan(file.path, plan, allow_requantize=allow_requantize)
        _print_mix(plan)
        click.echo(_sizes(plan))
        return
    done = quantize_model(
        path,
        target,
        file_type,
        imatrix=imatrix,
        output_tensor_type=output_type,
        token_embedding_type=embedding_type,
        tensor_types=overrides,
        pure=pure,
        allow_requantize=allow_requantize,
        force=force,
        n_threads=n_threads,
        progress=shown,
    )
    n_again = sum(step.is_requantised for step in done.plan.steps)
    if n_again:
        click.echo(f"phi-c: warning: {n_again} tensors were already quantised and have lost precision twice", err=True)
    if done.n_without_importance:
        click.echo(
            f"phi-c: warning: the importance matrix has no values for {done.n_without_importance} tensors", err=True
        )
    if not quiet:
        click.echo(f"{done.path}: {_sizes(done.plan)}, {done.seconds:.1f} s")


def _override(text: str) -> tuple[str, str]:
    pattern, equals, kind = text.rpartition("=")
    if not (pattern and equals and kind):
        raise OptionError(f"--tensor-type is {text!r}, expected REGEX=TYPE, such as ffn_down=Q8_0")
    return pattern, kind


def _sizes(plan: "QuantizePlan") -> str:
    return (
        f"{plan.source_bytes / 1e6:.1f} MB -> {plan.n_bytes / 1e6:.1f} MB, {plan.bits_per_weight:.2f} bits per weight"
    )


def _print_mix(plan: "QuantizePlan") -> None:
    """A row for each kind of tensor and its type, with the layers that have it so."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    for step in plan.steps:
        match = re.match(r"blk\.(\d+)\.(.*)", step.source.name)
        key = (match[2] if match else step.source.name, step.source_type, step.target_type)
        layers.setdefault(key, []).extend([int(match[1])] if match else [])
    width = max(len(name) for name, _, _ in layers)
    for (name, now, then), found in layers.items():
        change = now if now == then else f"{now} -> {then}"
        click.echo(f"{name:{width}}  {change:12}  {_ranges(sorted(found))}".rstrip())


def _ranges(numbers: list[int]) -> str:
    """Return 0-3, 6, 9 for 0, 1, 2, 3, 6, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
