"""Runs the real command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def run_cli(*arguments: str | Path, stdin: bytes | str = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    """Return what `phi-c ARGUMENTS` printed; its stdin is a pipe."""
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
    """Return the command that runs phi-c with this interpreter."""
    return [sys.executable, "-m", "phi_c", *map(str, arguments)]
