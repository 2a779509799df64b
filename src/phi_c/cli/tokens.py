"""`phi-c tokens`: how a text is cut."""

import json
import sys

import click

from phi_c.cli.options import MODEL
from phi_c.errors import OptionError

_EPILOG = """\b
Examples:
  phi-c tokens --model smollm2 "Hello, world"
  phi-c tokens --count - < README.md
"""


@click.command("tokens", epilog=_EPILOG)
@click.argument("text")
@click.option("--ids", is_flag=True, help="Print the ids only, in one line.")
@click.option("--count", is_flag=True, help="Print the number of tokens only.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of ids and pieces.")
@click.option("--no-bos", is_flag=True, help="Do not begin with the BOS token.")
@click.option("--parse-special", is_flag=True, help="Read <|end|> and the like as special tokens.")
@click.option("--tokenizer", type=click.Path(), metavar="FILE", help="A tokenizer.json instead of the model's own.")
@MODEL
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
    """Show the tokens of TEXT; - reads it from stdin. Reads the model's header only."""
    from pathlib import Path  # noqa: PLC0415

    from phi_c import hub  # noqa: PLC0415 - with all below: `--help` does without
    from phi_c.gguf.reader import GGUFFile  # noqa: PLC0415
    from phi_c.text.tokenizer import load_tokenizer  # noqa: PLC0415

    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise OptionError(f"stdin is not UTF-8 text: {error.reason} at byte {error.start}") from None
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
