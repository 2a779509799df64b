"""`--help` of every verb: width, sections, sentences, examples, and the conventions of option names."""

import re

import click
import pytest
from click.testing import CliRunner

from phi_c.cli import SECTIONS, VERBS, group

RUNS_A_MODEL = {"generate", "chat", "score", "embed", "bench", "perplexity", "compare", "imatrix"}
TAKES_A_MODEL = RUNS_A_MODEL | {"tokens", "inspect", "doctor"}
HAS_A_DEFAULT_MODEL = {"generate", "chat", "score", "embed", "tokens", "perplexity"}
LOADING_OPTIONS = {
    "n_ctx": ["-c", "--ctx-size"],
    "n_threads": ["-t", "--threads"],
    "n_batch": ["-b", "--batch-size"],
    "kv_type": ["--kv-type"],
    "kv_cache_tokens": ["--kv-cache-tokens"],
    "layout": ["--layout"],
    "tier": ["--tier"],
    "rope": ["--rope"],
}
POSITIONAL = {
    "generate": ["PROMPT"],
    "score": ["PROMPT", "CONTINUATION..."],
    "embed": ["INPUT..."],
    "tokens": ["TEXT"],
    "perplexity": ["FILE"],
    "imatrix": ["TEXT_FILE"],
    "quantize": ["IN", "OUT", "TYPE"],
    "convert": ["SOURCE", "OUTPUT"],
    "pull": ["SOURCE..."],
    "rm": ["NAME..."],
    "completion": ["{bash|zsh|fish}"],
}


def verb_command(verb: str) -> click.Command:
    command = group.get_command(click.Context(group), verb)
    assert command is not None
    return command


def options_of(verb: str) -> dict[str, click.Option]:
    return {str(p.name): p for p in verb_command(verb).params if isinstance(p, click.Option)}


def help_of(*arguments: str) -> str:
    result = CliRunner().invoke(group, [*arguments, "--help"], prog_name="phi-c", env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("arguments", [(), *((verb,) for verb in VERBS)])
def test_help_fits_80_columns(arguments: tuple[str, ...]) -> None:
    assert [line for line in help_of(*arguments).splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_parse(verb: str) -> None:
    """Every option in the examples exists."""
    examples = help_of(verb).split("Examples:\n")[1]
    assert f"  phi-c {verb}" in examples
    known = {name for option in options_of(verb).values() for name in option.opts}
    for line in re.sub(r" *\\\n *", " ", examples).splitlines():
        arguments = line.partition(f"phi-c {verb} ")[2].partition(" | ")[0]
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", arguments)) <= known, line


@pytest.mark.parametrize("verb", VERBS)
def test_parameters_have_a_sentence_as_help(verb: str) -> None:
    """It begins with a capital letter and ends with a full stop, which the default may follow in brackets."""
    for parameter in verb_command(verb).params:
        text = getattr(parameter, "help", None) or ""
        assert re.fullmatch(r"[A-Z][^\n]*\.( +\[default: [^\]]+\])?", text), (parameter.name, text)


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_grouped_and_show_one_default(verb: str) -> None:
    text = help_of(verb)
    assert all(getattr(option, "group", None) for option in options_of(verb).values())
    assert not re.search(r"\]\s+\[", re.sub(r"\[[^\]]*\|[^\]]*\]", "", text.partition("\n\n")[2]))
    assert "x>=" not in text


def test_sections_list_every_verb_once() -> None:
    assert len(set(VERBS)) == len(VERBS)
    text = help_of()
    for title, verbs in SECTIONS.items():
        section = text.split(f"{title}:\n")[1].split("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines()] == list(verbs)


@pytest.mark.parametrize("verb", VERBS)
def test_model_option(verb: str) -> None:
    model = options_of(verb).get("model")
    assert (model is not None) == (verb in TAKES_A_MODEL)
    if model is not None:
        assert (model.opts, model.metavar) == (["-m", "--model"], "SOURCE")
        assert (model.default == "phi-3-mini") == (verb in HAS_A_DEFAULT_MODEL)
        assert model.required == (verb == "compare")


@pytest.mark.parametrize("verb", VERBS)
def test_loading_options(verb: str) -> None:
    options = options_of(verb)
    for name, opts in LOADING_OPTIONS.items():
        if verb in RUNS_A_MODEL or name in options:
            assert options[name].opts == opts
    assert ("tier" in options) == (verb in RUNS_A_MODEL or verb == "doctor")
    names = {name for option in options.values() for name in option.opts}
    assert {name for name in names if "ctx" in name or "batch" in name} <= {"--ctx-size", "--batch-size", "--batch"}


@pytest.mark.parametrize("verb", VERBS)
def test_positional_arguments(verb: str) -> None:
    command = verb_command(verb)
    context = click.Context(command)
    arguments = [p.make_metavar(context).strip("[]") for p in command.params if isinstance(p, click.Argument)]
    assert arguments == POSITIONAL.get(verb, [])


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_max_tokens_option(verb: str) -> None:
    assert options_of(verb)["max_tokens"].opts == ["-n", "--max-tokens", "--sample-len"]
