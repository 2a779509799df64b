"""Compares a report of `phi-c bench --kernels --json` with an earlier one."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from phi_c.bench.kernels import Kernel
from phi_c.errors import OptionError

_TIMES = ("ns", "ns_low", "ns_high")


def read_report(path: str) -> dict[Kernel, tuple[float, float, float]]:
    """Return the time in ns and its interval, (median, low, high), of each kernel of an earlier report.

    Raises OptionError if the file is not such a report.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _not_a_report(path, f"{type(error).__name__}: {error}") from None
    rows = report.get("kernels") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not rows:
        raise _not_a_report(path, "it has no list 'kernels'")
    times = {}
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not _is_row(row):
            raise _not_a_report(path, f"kernels[{i}] does not have the keys and types of a kernel")
        times[_kernel_of(row)] = (float(row["ns"]), float(row["ns_low"]), float(row["ns_high"]))
    return times


def _not_a_report(path: str, why: str) -> OptionError:
    return OptionError(f"--compare is {path!r}, expected the output of phi-c bench --kernels --json: {why}")


def _is_row(row: dict[str, Any]) -> bool:
    names = all(isinstance(row.get(field.name), int if field.name == "n_tokens" else str) for field in fields(Kernel))
    return names and all(isinstance(row.get(name), int | float) and row[name] > 0 for name in _TIMES)


def _kernel_of(row: dict[str, Any]) -> Kernel:
    return Kernel(**{field.name: row[field.name] for field in fields(Kernel)})


def check_common(path: str, earlier: dict[Kernel, Any], kernels: list[Kernel]) -> None:
    """Raise OptionError if a report has none of the kernels to measure."""
    if not any(kernel in earlier for kernel in kernels):
        raise OptionError(
            f"--compare is {path!r}, expected a report with at least one of the kernels to measure, such as "
            f"'{kernels[0]}'; it has '{next(iter(earlier))}'"
        )


def add_ratios(report: dict[str, Any], earlier: dict[Kernel, tuple[float, float, float]]) -> None:
    """Add to each kernel of a report the ratio of its time to the earlier one, its interval, and whether it differs.

    The interval spans all ratios of times in the two intervals; a kernel differs if these do not overlap. The four keys
    are None for kernels that the earlier report does not have.
    """
    for row in report["kernels"]:
        then = earlier.get(_kernel_of(row))
        row["ratio"] = row["ratio_low"] = row["ratio_high"] = row["differs"] = None
        if then is not None:
            row["ratio"] = round(row["ns"] / then[0], 4)
            row["ratio_low"] = round(row["ns_low"] / then[2], 4)
            row["ratio_high"] = round(row["ns_high"] / then[1], 4)
            row["differs"] = row["ns_low"] > then[2] or row["ns_high"] < then[1]
