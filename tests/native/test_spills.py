"""Compilers keep all values of the product loops of small batches in registers, and most values of the others."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CPU = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
FLAGS = ["-O3", "-DNDEBUG", "-std=c11", "-fPIC", "-ffp-contract=off", "-Wno-psabi", *CPU]
MAX_SPILLS_PER_DOT = 1 / 6  # of loops over two panels: some compilers spill one register per 16 dot products
# Of loops for one token, which spill lines of Q5_K and Q6_K panels: with RELOAD they would spill none, but read these
# lines again, out of order, and take 1.3 times as long from memory.
MAX_SPILLS_OF_ONE_TOKEN = 2 / 3
UNIT_DOTS = (8, 64)  # dot products of a token with a unit of 32 and of 256 columns, which a loop unrolls
SMALL_BATCHES = (2, 3, 4)


def installed(name: str, versions: range) -> list[str]:
    """Return the commands of all installed versions of a compiler; without any, its name."""
    return [f"{name}-{n}" for n in versions if shutil.which(f"{name}-{n}")] or [name]


def product_loops(assembly: str) -> list[tuple[int, int]]:
    """Return (dot products, vector registers spilled) of every innermost loop with a dot product.

    A spill is a store of a vector register to a stack slot that the compiler made, which it marks in a comment: gcc as
    %sfp, clang as Spill. Values that a loop only reads from such slots, stored before it, are not counted, nor are
    stores to arrays of the source.
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
        counts.append((sum(bool(re.match(r"\s+vpdpbusd", line)) for line in body), len(spills)))
    return [count for count in counts if count[0]]


@pytest.mark.parametrize("compiler", [*installed("gcc", range(11, 21)), *installed("clang", range(14, 26))])
def test_product_loops_of_avx512_do_not_spill(compiler: str) -> None:
    """Loops over units for 2 to 4 tokens spill nothing; the others stay below their ceilings."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    target = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    if not target.startswith("x86_64"):
        pytest.skip(f"{compiler} compiles for {target.strip()}, not x86_64")
    source = CSRC / "kernels/avx512/packed_matmul.c"
    command = [compiler, *FLAGS, f"-I{CSRC}", "-S", "-fverbose-asm", "-o", "-", str(source)]
    loops = product_loops(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    small_batch_dots = {dots * n for dots in UNIT_DOTS for n in SMALL_BATCHES}
    small_batch_dots.remove(2 * UNIT_DOTS[0])  # as many as one token of two panels
    assert {dots * n for dots in UNIT_DOTS[1:] for n in SMALL_BATCHES} <= {dots for dots, _ in loops}
    assert [loop for loop in loops if loop[0] in small_batch_dots and loop[1]] == []
    for dots, spills in loops:
        ceiling = MAX_SPILLS_OF_ONE_TOKEN if dots == UNIT_DOTS[1] else MAX_SPILLS_PER_DOT
        assert spills <= ceiling * dots, f"{spills} spills in a loop of {dots} dot products"
