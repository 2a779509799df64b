"""Speed by batch size: medians with intervals, and the sizes at which one more sequence makes decoding slower."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from phi_c.bench.statistics import median_interval, paired_ratio

_BAR_CHARS = 40


def curve(speeds: Mapping[int, Sequence[float]]) -> list[dict[str, Any]]:
    """Return a row for each batch size, in the order given: median and 95 % interval in tokens per second.

    speeds: by number of sequences, the speed in each repetition.
    """
    rows = []
    for n_seqs, samples in speeds.items():
        median, low, high = (round(x, 3) for x in median_interval(samples))
        rows.append({"n_seqs": n_seqs, "tok_s": median, "tok_s_low": low, "tok_s_high": high})
    return rows


def steps(speeds: Mapping[int, Sequence[float]]) -> list[dict[str, Any]]:
    """Return a row for each pair of neighbouring batch sizes: the ratio of their speeds in the same repetition.

    speeds: see `curve`. A cliff is a step whose 95 % interval is below 1.
    """
    sizes, rows = sorted(speeds), []
    for smaller, larger in pairwise(sizes):
        ratio, low, high = (round(x, 4) for x in paired_ratio(speeds[larger], speeds[smaller]))
        rows.append({"from": smaller, "to": larger, "ratio": ratio, "low": low, "high": high, "cliff": high < 1})
    return rows


def chart(curve_rows: Sequence[dict[str, Any]], step_rows: Sequence[dict[str, Any]]) -> str:
    """Return the curve as bars of plain text, a line for each batch size; a line with a cliff ends with that word."""
    by_size = {step["to"]: step for step in step_rows}
    highest = max(row["tok_s"] for row in curve_rows)
    lines = ["batch    tok/s     95 % interval     " + " " * _BAR_CHARS + "ratio to the size before"]
    for row in sorted(curve_rows, key=lambda row: int(row["n_seqs"])):
        bar = "#" * round(row["tok_s"] / highest * _BAR_CHARS)
        interval = f"{row['tok_s_low']:.2f} to {row['tok_s_high']:.2f}"
        line = f"{row['n_seqs']:5} {row['tok_s']:8.2f}  {interval:18} {bar:{_BAR_CHARS}}"
        step = by_size.get(row["n_seqs"])
        if step is not None:
            line += f"  {step['ratio']:.3f} ({step['low']:.3f} to {step['high']:.3f})" + "  cliff" * step["cliff"]
        lines.append(line.rstrip())
    return "\n".join(lines)
