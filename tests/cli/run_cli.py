"""Runs `phi-c` in its own process, or one of its verbs in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner, Result


def run_cli(*arguments: str | Path, stdin: bytes | str = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `phi-c ARGUMENTS` and return its output and exit code; stdin is a pipe."""
    done = subprocess.run(
        command(*arguments),
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        timeout=120,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def command(*arguments: str | Path) -> list[str]:
    """Return the argument list that runs phi-c with this interpreter."""
    return [sys.executable, "-m", "phi_c", *map(str, arguments)]


def invoke(verb: click.Command, *arguments: object, columns: int = 200) -> Result:
    """Run a verb in this process, on a terminal of `columns` columns; an error is the result's exception."""
    return CliRunner().invoke(verb, [str(a) for a in arguments], env={"COLUMNS": str(columns)})


def invoke_json(verb: click.Command, *arguments: object) -> dict[str, Any]:
    """Run a verb with --json in this process and return its report."""
    result = invoke(verb, *arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed
