"""`phi-c embed`: embedding vectors of inputs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.inputs import read_stdin
from phi_c.cli.loading import load
from phi_c.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_EPILOG = """\b
Examples:
  phi-c embed -m smollm2 "ice hockey" "figure skating"
  phi-c embed -m smollm2 --output vectors.npy - < sentences.txt
"""


@cloup.command("embed", epilog=_EPILOG)
@cloup.argument(
    "inputs",
    nargs=-1,
    required=True,
    metavar="INPUT...",
    help="Raw text to embed; '-' reads inputs from stdin, one per line.",
)
@opt.inference_options()
@cloup.option_group(
    "Embedding options",
    cloup.option(
        "--pooling",
        type=click.Choice(["mean", "last"]),
        default="mean",
        show_default=True,
        help="Pooling of the hidden states: the mean over all tokens, or the last token.",
    ),
    cloup.option("--no-normalize", is_flag=True, help="Do not scale vectors to length 1."),
    opt.parse_special(),
)
@cloup.option_group(
    "Output options",
    cloup.option(
        "-o",
        "--output",
        type=click.Path(),
        metavar="FILE.npy",
        help="NumPy file to write, float32 [n_inputs, n_embd], in place of JSON lines.",
    ),
)
def command(
    inputs: tuple[str, ...],
    pooling: str,
    no_normalize: bool,
    parse_special: bool,
    output: str | None,
    model: str,
    **options: Any,
) -> None:
    """Print an embedding vector for each INPUT, as JSON lines of {"index": I, "embedding": [...]}.

    A vector is pooled from the hidden states after the final norm.
    """
    all_inputs = [line for text in inputs for line in (read_stdin().splitlines() if text == "-" else [text])]
    if not all_inputs:
        raise OptionError("there is no input on stdin, expected one per line")
    with load(model, **opt.pop_loading_options(options)) as llm:
        vectors = llm.embed(all_inputs, pooling=pooling, normalize=not no_normalize, parse_special=parse_special)
    if output is None:
        for index, vector in enumerate(vectors):
            # The shortest decimal numbers that are read back as the same float32.
            click.echo(json.dumps({"index": index, "embedding": [float(str(x)) for x in vector]}))
    else:
        _save(Path(output), vectors)
        click.echo(f"{output}: {vectors.shape[0]} vectors of {vectors.shape[1]} dimensions", err=True)


def _save(path: Path, vectors: "npt.NDArray[np.float32]") -> None:
    import numpy as np  # noqa: PLC0415 - not needed for `--help`

    from phi_c.storage import atomic_write  # noqa: PLC0415

    with atomic_write(path) as file:
        np.save(file, vectors)
