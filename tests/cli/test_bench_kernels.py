"""`phi-c bench --kernels`: JSON, tables, options and their errors, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from run_cli import command, invoke, invoke_json, run_cli

from phi_c import _core
from phi_c.bench import kernels
from phi_c.cli import bench

QUICK = ("--kernels", "--repeat", "2")
SMALL = (*QUICK, "--type", "Q4_K,F16", "--tokens", "1,20", "--rows", "16", "--cols", "256")
KEYS = {
    "op", "type", "tier", "n_tokens", "size", "data", "ns", "ns_low", "ns_high", "spread", "cycles", "gb_s", "gmac_s",
    "limit", "share",
}  # fmt: skip
RATIO_KEYS = {"ratio", "ratio_low", "ratio_high", "differs"}
BEST = _core.tiers()[-1]
run = partial(invoke, bench.command, columns=120)
report = partial(invoke_json, bench.command)


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ARENA_BYTES", 8 << 20)
    monkeypatch.delenv("PHI_C_ISA", raising=False)


def test_json() -> None:
    found = report(*SMALL, "--tier", f"{BEST},scalar")
    assert found.keys() == {
        "kernels", "n_samples", "disturbed", "cpu", "clock_ghz", "read_gb_s", "multiply_gmac_s", "version"
    }  # fmt: skip
    assert found["n_samples"] == 2
    rows = found["kernels"]
    assert all(row.keys() == KEYS for row in rows)
    assert {(row["type"], row["tier"], row["n_tokens"], row["data"]) for row in rows} == {
        (kind, tier, n, data)
        for kind in ("Q4_K", "F16")
        for tier in {BEST, "scalar"}
        for n, data in ((1, "cache"), (1, "memory"), (20, "cache"))
    }
    for row in rows:
        n_macs, n_bytes = 16 * 256 * row["n_tokens"], 16 * {"Q4_K": 144, "F16": 512}[row["type"]]
        assert 0 < row["ns_low"] < row["ns"] < row["ns_high"]
        assert row["gmac_s"] == pytest.approx(n_macs / row["ns"], rel=1e-3)
        assert row["gb_s"] == pytest.approx(n_bytes / row["ns"], rel=1e-3)
        assert 0.2 < row["cycles"] / row["ns"] < 20  # GHz
        assert row["limit"] == ("read" if row["data"] == "memory" else None if row["tier"] == "scalar" else "multiply")
        if row["limit"] == "read":
            assert row["share"] == pytest.approx(row["gb_s"] / found["read_gb_s"], rel=1e-2)


def test_tables() -> None:
    result = run(
        *QUICK, "--op", "matmul,rope,barrier", "--type", "Q4_K", "--tokens", "1", "--tier", BEST, "--cols", 256
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # progress is shown on terminals only
    lines = result.stdout.splitlines()
    titles = ["matmul, one thread", "rope, one thread", "barrier, by threads"]
    assert [line.strip() for line in lines if line.strip() in titles] == titles
    header = next(line.split() for line in lines if "GMAC/s" in line)
    assert header == ["type", "tier", "tokens", "size", "data", "time", "+/-", "cycles", "GB/s", "GMAC/s",
                      *(["limit"] if "limit" in header else [])]  # fmt: skip
    rows = [line.split() for line in lines if line.lstrip().startswith(("Q4_K", "neox", "interleaved"))]
    assert [row[0] for row in rows] == ["Q4_K", "Q4_K", "neox", "interleaved"]
    assert lines[-1].startswith("disturbed: ") and "2 samples per kernel" in lines[-2]


def test_compare(tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    earlier = report(*SMALL, "--tier", BEST, "--cache")
    for row in earlier["kernels"]:  # then: a thousandth of the time, or the same interval from 0 to infinity
        factors = (1e-3, 1e-3, 1e-3) if row["type"] == "F16" else (1, 1e-9, 1e9)
        row["ns"], row["ns_low"], row["ns_high"] = (row["ns"] * factor for factor in factors)
    before.write_text(json.dumps(earlier))
    found = report(*SMALL, "--tier", BEST, "--compare", before)["kernels"]
    assert all(row.keys() == KEYS | RATIO_KEYS for row in found)
    by_name = {(row["type"], row["n_tokens"], row["data"]): row for row in found}
    assert by_name["F16", 1, "cache"]["differs"] is True and by_name["F16", 1, "cache"]["ratio"] > 50
    assert by_name["Q4_K", 20, "cache"]["differs"] is False
    assert by_name["Q4_K", 1, "memory"]["ratio"] is None  # not in the earlier run
    text = run(*SMALL, "--tier", BEST, "--compare", before).stdout
    assert text.count("slower") == 2 and "now/then" in text
    assert "2 of 4 kernels differ from the earlier run" in text


def test_tier_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI_C_ISA", "scalar")
    assert {row["tier"] for row in report(*SMALL)["kernels"]} == {"scalar"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--type", "Q4_K,Q9"], "--type is 'Q4_K,Q9', expected one or several of F32, F16, BF16, Q4_0"),
        (["--tier", "z80"], "--tier is 'z80', expected one or several of scalar"),
        (["--op", "matmul,fft"], "--op is 'matmul,fft', expected one or several of matmul, attention, rms_norm"),
        (["--tokens", "0"], "--tokens is '0', expected integers of at least 1"),
        (["--cols", "100", "--type", "Q4_K"], "--cols is 100, expected a multiple of 256, the block of Q4_K"),
        (["--cols", "33", "--op", "gelu"], "--cols is 33, expected a multiple of 32"),
        (
            ["--rows", "100000000", "--type", "F32"],
            "100000000 x 3072 weights of F32 have 1228800000000 bytes, expected",
        ),
        (["--op", "gelu", "--tokens", "4"], "--tokens applies to products, expected matmul in --op, found 'gelu'"),
        (["--op", "gelu", "--type", "F32"], "--type applies to products, expected matmul in --op, found 'gelu'"),
        (["--prefill", "8"], "--prefill does not apply to --kernels, expected an option of kernels"),
        (["--threads", "2"], "--threads does not apply to --kernels, expected an option of kernels"),
        (["--compare", "missing.json"], "--compare is 'missing.json', expected the output of phi-c bench --kernels"),
    ],
)
def test_option_errors(arguments: list[str], message: str) -> None:
    done = run_cli("bench", "--kernels", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"phi-c: error: {message}")
    assert done.stderr.count("\n") == 1


def test_kernel_options_need_kernels() -> None:
    done = run_cli("bench", "-m", "smollm2", "--type", "Q4_K")
    assert done.returncode == 2
    assert done.stderr == "phi-c: error: --type is an option of kernels, expected it together with --kernels\n"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_exits_with_130() -> None:
    """Also within a call of a kernel that takes minutes."""
    arguments = command(
        "bench", "--kernels", "--tier", "scalar", "--type", "Q4_K", "--tokens", "9000", "--rows", "9600"
    )
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        try:
            time.sleep(4)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()  # else a failure would wait for it
    assert (process.returncode, out, err.strip()) == (130, b"", b"")
