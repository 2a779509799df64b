"""`phi-c quantize`: quantises a model file."""

import re
import sys
from typing import TYPE_CHECKING

import click
import cloup

from phi_c.cli import options as opt
from phi_c.errors import OptionError

if TYPE_CHECKING:
    from phi_c.quantize.plan import QuantizePlan

_EPILOG = """\b
File types, from most to fewest bits per weight:
  F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0
  Q3_K_L Q3_K_M Q3_K_S Q2_K

\b
Examples:
  phi-c quantize Phi-3.5-mini-F16.gguf Phi-3.5-mini-Q4_K_M.gguf Q4_K_M
  phi-c quantize model-F32.gguf model-Q4_K_M.gguf Q4_K_M --imatrix imatrix.gguf
  phi-c quantize F16.gguf Q6_K.gguf Q6_K --tensor-type ffn_down=Q8_0 --dry-run
"""


@cloup.command("quantize", epilog=_EPILOG)
@cloup.argument("source", metavar="IN", help="Model to quantise: a path or another SOURCE of `phi-c generate`.")
@cloup.argument("target", metavar="OUT", type=click.Path(), help="GGUF file to write.")
@cloup.argument("file_type", metavar="TYPE", help="File type, from the list below.")
@cloup.option_group(
    "Quantisation options",
    cloup.option(
        "--imatrix", type=click.Path(), metavar="FILE", help="Importance matrix that weights the quantisation error."
    ),
    cloup.option("--output-tensor-type", "output_type", metavar="TYPE", help="Tensor type of output.weight."),
    cloup.option("--token-embedding-type", "embedding_type", metavar="TYPE", help="Tensor type of token_embd.weight."),
    cloup.option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        metavar="REGEX=TYPE",
        help="Tensor type of the matrices whose names match REGEX. Can be repeated.",
    ),
    cloup.option("--pure", is_flag=True, help="Use one type for all matrices, without a mix."),
    cloup.option(
        "--allow-requantize", is_flag=True, help="Accept matrices that are already quantised, at a loss of quality."
    ),
    opt.threads(),
)
@cloup.option_group(
    "Output options",
    cloup.option("-f", "--force", is_flag=True, help="Replace OUT if it exists."),
    cloup.option("--dry-run", is_flag=True, help="Print the types and the size, and write nothing."),
    opt.quiet("Show no progress bar and no summary."),
)
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
    """Quantise the matrices of the model file IN to TYPE and write OUT.

    TYPE is a mix of tensor types, chosen as llama.cpp does. IN should have F32, F16 or BF16 weights. OUT appears only
    when it is complete.
    """
    from phi_c import hub  # noqa: PLC0415 - with the next: not needed for `--help`
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
    """Print a line for each kind of tensor and type, with its layers."""
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
    """Return sorted numbers as ranges: "0-3, 6, 9" for 0, 1, 2, 3, 6, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
