"""Reports of earlier kernel benchmarks: what is accepted, and the ratios."""

import json
from pathlib import Path
from typing import Any

import pytest

from phi_c.bench.comparison import add_ratios, check_common, read_report
from phi_c.bench.kernels import Kernel
from phi_c.errors import OptionError

ROW = {"op": "matmul", "type": "Q4_K", "tier": "avx2", "n_tokens": 1, "size": "16x256", "data": "cache"}
TIMES = {"ns": 100.0, "ns_low": 95.0, "ns_high": 110.0}
KERNEL = Kernel("matmul", "Q4_K", "avx2", 1, "16x256", "cache")


def test_report_is_read(tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"kernels": [ROW | TIMES | {"gb_s": None}], "disturbed": None}))
    assert read_report(str(path)) == {KERNEL: (100, 95, 110)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "FileNotFoundError"),
        ("nothing", "JSONDecodeError"),
        ("[]", "it has no list 'kernels'"),
        ('{"kernels": []}', "it has no list 'kernels'"),
        ('{"kernels": [3]}', "kernels[0] does not have the keys"),
        (json.dumps({"kernels": [ROW]}), "kernels[0] does not have the keys"),
        (json.dumps({"kernels": [ROW | TIMES, ROW | TIMES | {"ns": 0}]}), "kernels[1] does not have the keys"),
        (json.dumps({"kernels": [ROW | TIMES | {"n_tokens": "1"}]}), "kernels[0] does not have the keys"),
    ],
)
def test_other_files(tmp_path: Path, text: str | None, reason: str) -> None:
    path = tmp_path / "before.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError) as error:
        read_report(str(path))
    assert str(error.value).startswith(f"--compare is {str(path)!r}, expected the output of phi-c bench --kernels")
    assert reason in str(error.value)


def test_a_report_without_a_common_kernel() -> None:
    other = Kernel("gelu", "", "avx2", 1, "8192", "cache")
    check_common("f", {KERNEL: None}, [other, KERNEL])
    with pytest.raises(OptionError, match="'gelu avx2 1 tokens 8192 cache'; it has 'matmul Q4_K avx2"):
        check_common("f", {KERNEL: None}, [other])


@pytest.mark.parametrize(
    ("now", "ratios", "differs"),
    [
        ((200, 190, 220), (2, 1.7273, 2.3158), True),
        ((50, 45, 55), (0.5, 0.4091, 0.5789), True),
        ((112, 108, 120), (1.12, 0.9818, 1.2632), False),
    ],
)
def test_ratios(now: tuple[float, ...], ratios: tuple[float, ...], differs: bool) -> None:
    row: dict[str, Any] = {**ROW, **dict(zip(TIMES, now, strict=True))}
    new = {**ROW, "type": "Q6_K", **TIMES}
    report = {"kernels": [row, new]}
    add_ratios(report, {KERNEL: (100, 95, 110)})
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == ratios
    assert row["differs"] is differs
    assert new["ratio"] is new["ratio_low"] is new["ratio_high"] is new["differs"] is None
