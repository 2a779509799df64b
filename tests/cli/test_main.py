"""The `phi-c` command as a whole: list of verbs, exit codes, one-line errors, completion."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_cli import command, run_cli

from phi_c.cli import VERBS


def test_help_lists_every_verb_without_heavy_imports() -> None:
    done = run_cli("--help")
    assert all(re.search(rf"^  {verb} ", done.stdout, re.MULTILINE) for verb in VERBS)
    script = (
        "import sys, phi_c.cli; print({'numpy', 'tokenizers', 'huggingface_hub', 'cloup', 'rich'} & set(sys.modules))"
    )
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "set()"


def test_version() -> None:
    from importlib.metadata import version

    assert run_cli("--version").stdout.strip() == f"phi-c, version {version('phi-c')}"


USAGE = {
    ("generte",): "No such command 'generte'",
    ("generate", "--temprature", "1", "x"): "No such option",
    ("generate", "--seed", "x", "y"): "'x' is not a valid integer",
    ("generate", "--logit-bias", "1", "x"): "is not ID=BIAS",
    ("tokens",): "Missing argument 'TEXT'",
    ("rm",): "Missing argument 'NAME...'",
}


@pytest.mark.parametrize("arguments", USAGE)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    done = run_cli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert USAGE[arguments] in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, followed by bytes that are not a valid header")
    for model in (tmp_path / "bad.gguf", tmp_path, tmp_path / "none.gguf", "phi3-mini"):
        for verb in (("generate", "x"), ("tokens", "x"), ("inspect",), ("score", "x", "y"), ("embed", "x")):
            done = run_cli(*verb, "--model", model)
            assert (done.returncode, done.stdout) == (1, ""), done.stderr
            assert re.fullmatch(r"phi-c: error: .+\n", done.stderr)


def test_debug_variable_shows_the_traceback(tmp_path: Path) -> None:
    done = run_cli("inspect", "-m", tmp_path / "none.gguf", PHI_C_DEBUG="1")
    assert "Traceback" in done.stderr


def test_closed_pipe_prints_no_traceback() -> None:
    with subprocess.Popen(command("list"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1  # as in click


@pytest.mark.parametrize(("shell", "sign"), [("bash", "complete -o nosort"), ("zsh", "compdef"), ("fish", "complete")])
def test_completion_scripts(shell: str, sign: str) -> None:
    done = run_cli("completion", shell)
    assert done.returncode == 0
    assert sign in done.stdout
    assert "_PHI_C_COMPLETE" in done.stdout


def test_completion_completes() -> None:
    done = run_cli(_PHI_C_COMPLETE="bash_complete", COMP_WORDS="phi-c gen", COMP_CWORD="1")
    assert done.stdout.strip() == "plain,generate"
    for words, expected in (
        ("phi-c generate --temp", "plain,--temperature"),
        ("phi-c score --ctx-s", "plain,--ctx-size"),
        ("phi-c embed --pool", "plain,--pooling"),
        ("phi-c rm --dry", "plain,--dry-run"),
    ):
        done = run_cli(_PHI_C_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD="2")
        assert done.stdout.strip() == expected
