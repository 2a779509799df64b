"""Compilers keep most values of the innermost product loops in registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CPU = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
FLAGS = ["-O3", "-DNDEBUG", "-std=c11", "-fPIC", "-ffp-contract=off", "-Wno-psabi", *CPU]
MAX_SPILLS_PER_DOT = 1 / 6  # loops that unroll a whole unit for two to four tokens spill up to 0.16, others 0.06
CLANG = next((f"clang-{n}" for n in range(25, 13, -1) if shutil.which(f"clang-{n}")), "clang")


def product_loops(assembly: str) -> list[tuple[int, int]]:
    """Return (dot products, vector registers spilled) of every innermost loop with a dot product.

    Both compilers mark a spill in a comment: gcc as %sfp, clang as Spill.
    """
    lines = assembly.splitlines()
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for n, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = n
        elif (jump := re.match(r"\s+j\w+\s+(\.L\w+)", line)) and jump[1] in labels:
            loops.append((labels[jump[1]], n))
    counts = []
    for start, end in loops:
        if any((a, b) != (start, end) and start <= a and b <= end for a, b in loops):
            continue
        body = lines[start : end + 1]
        spills = [line for line in body if re.search(r"\bvmov\w+\s+%[xyz]mm\d+, .*\(%r[sb]p\).*(%sfp|Spill)", line)]
        counts.append((sum("vpdpbusd" in line for line in body), len(spills)))
    return [count for count in counts if count[0]]


@pytest.mark.parametrize("compiler", ["gcc", CLANG])
def test_product_loops_of_avx512_hardly_spill(compiler: str) -> None:
    """At most one vector register is spilled per six dot products."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    target = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    if not target.startswith("x86_64"):
        pytest.skip(f"{compiler} compiles for {target.strip()}, not x86_64")
    source = CSRC / "kernels/avx512/packed_matmul.c"
    command = [compiler, *FLAGS, f"-I{CSRC}", "-S", "-fverbose-asm", "-o", "-", str(source)]
    loops = product_loops(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(loops) >= 6
    assert [loop for loop in loops if loop[1] > MAX_SPILLS_PER_DOT * loop[0]] == []
