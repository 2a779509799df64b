"""`phi-c tokens`: tokenizes text."""

import json
import sys

import click
import cloup

from phi_c.cli import options as opt
from phi_c.cli.inputs import read_stdin

_EPILOG = """\b
Examples:
  phi-c tokens -m smollm2 "Hello, world"
  phi-c tokens --count - < README.md
"""


@cloup.command("tokens", epilog=_EPILOG)
@cloup.argument("text", help="Text to tokenize; '-' reads it from stdin.")
@cloup.option_group(
    "Tokenizer options",
    opt.model_with_default(),
    opt.tokenizer(),
    cloup.option("--no-bos", is_flag=True, help="Omit the BOS token at the beginning."),
    opt.parse_special(),
)
@cloup.option_group(
    "Output options",
    cloup.option("--ids", is_flag=True, help="Print only the token ids, on one line."),
    cloup.option("--count", is_flag=True, help="Print only the number of tokens."),
    opt.json_flag("Print a JSON array of token ids and pieces."),
)
def command(
    text: str,
    ids: bool,
    count: bool,
    as_json: bool,
    no_bos: bool,
    parse_special: bool,
    tokenizer: str | None,
    model: str,
) -> None:
    """Tokenize TEXT and print one token per line: id and piece.

    Only the header of the model file is read.
    """
    from pathlib import Path  # noqa: PLC0415

    from phi_c import hub  # noqa: PLC0415 - with the next: not needed for `--help`
    from phi_c.gguf.reader import GGUFFile  # noqa: PLC0415
    from phi_c.text.tokenizer import load_tokenizer  # noqa: PLC0415

    if text == "-":
        text = read_stdin()
    path = hub.resolve(model, progress=sys.stderr.isatty())
    with GGUFFile(path) as file:
        encoder = load_tokenizer(file.metadata, Path(tokenizer) if tokenizer else hub.resolve_tokenizer(model), path)
    tokens = encoder.encode(text, add_bos=False if no_bos else None, parse_special=parse_special)
    if count:
        click.echo(len(tokens))
    elif ids:
        click.echo(" ".join(map(str, tokens)))
    else:
        pieces = [encoder.piece(token, special=True).decode("utf-8", "backslashreplace") for token in tokens]
        if as_json:
            rows = [{"id": token, "piece": piece} for token, piece in zip(tokens, pieces, strict=True)]
            click.echo(json.dumps(rows, ensure_ascii=False))
        else:
            for token, piece in zip(tokens, pieces, strict=True):
                click.echo(f"{token:7}  {json.dumps(piece, ensure_ascii=False)}")
