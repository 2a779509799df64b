"""Runs `phi-c` in its own process."""

import os
import subprocess
import sys
from pathlib import Path


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
