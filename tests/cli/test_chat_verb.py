"""`phi-c chat` with piped input and on a pseudo-terminal."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_cli import command, run_cli

from tiny_gguf import write_tiny

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX pseudo-terminals")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0")


def test_piped_conversation(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = [
        "Hi",
        "/system Be brief.",
        "and you?",
        f"/save {saved}",
        "/reset",
        "/wrong",
        "/save",
        "/exit",
        "not sent",
    ]
    done = run_cli("chat", "-m", model, "--max-tokens", "4", "--seed", "1", stdin="\n".join(lines))
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "system message set",
        f"saved 5 messages to {saved}",
        "conversation cleared",
        "unknown command /wrong; /help lists the commands",
        "/save needs a file name",
    ]
    messages = json.loads(saved.read_text(encoding="utf-8"))
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages if m["role"] != "assistant"] == ["Be brief.", "Hi", "and you?"]
    assert done.stdout == "".join(m["content"] + "\n" for m in messages if m["role"] == "assistant")


def test_full_context_keeps_the_conversation(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = ["Hi", "the " * 60, f"/save {saved}", "/reset", "Hi"]
    done = run_cli("chat", "-m", model, "-c", "64", "--max-tokens", "2", "--seed", "1", stdin="\n".join(lines))
    assert done.returncode == 0
    assert "more than the context size of 64: shorten it" in done.stderr
    assert "/reset clears the conversation" in done.stderr
    assert len(json.loads(saved.read_text(encoding="utf-8"))) == 2


def test_save_to_an_unwritable_path(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_cli("chat", "-m", model, stdin=f"/save {tmp_path}/file/x.json\n/exit")
    assert done.returncode == 0
    assert "cannot be written" in done.stderr


@posix
def test_terminal_session(model: Path, tmp_path: Path) -> None:
    """Send a message, interrupt the reply, leave with Ctrl-D; the message is in the history file."""
    import pty

    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PHI_C_CACHE": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(
        command("chat", "-m", model, "--seed", "3", "--logit-bias", "2=-inf"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment,
        start_new_session=True,
        close_fds=True,
    )
    os.close(terminal)
    output = b""

    def wait_for(text: bytes, at_least: int = 0) -> None:
        nonlocal output
        end = time.monotonic() + 30
        while text not in output or len(output) < at_least:
            assert time.monotonic() < end, output
            if select.select([controller], [], [], 1)[0]:
                output += os.read(controller, 4096)

    try:
        wait_for(b"/help for help")
        wait_for(b"\x1b[?2004h")
        os.write(controller, b"tell me all\r")
        wait_for(b"tell me all", len(output) + 200)
        process.send_signal(signal.SIGINT)
        output = b""
        wait_for(b"\x1b[?2004h")
        os.write(controller, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert "tell me all" in (tmp_path / "chat_history").read_text(encoding="utf-8")
