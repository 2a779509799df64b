"""Count the instructions that ARM kernels take for a super-block, since an emulator tells no time.

    python benchmarks/instruction_counts.py BUILD_DIR

BUILD_DIR is a build of the C library for aarch64 (docs/arm.md). Products run under qemu-aarch64, which logs the address
of every instruction; those within the kernel are counted and named by the disassembly. Taken at 1024 and at 512
columns, the difference is what 512 columns cost, without a product's beginning and end. Printed for one row and token
and 256 columns: all instructions, and those that multiply bytes.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
FILE_TYPES = (*TYPES, "Q5_0", "Q5_1", "Q2_K", "Q3_K")
TIERS = ("neon", "dotprod", "i8mm")
MULTIPLIES = {"smull", "smull2", "smlal", "smlal2", "sdot", "smmla"}
SHAPES = (("packed", 16, 1), ("packed", 16, 4), ("packed", 16, 64))  # layout, rows, tokens
FEW_COLS, MANY_COLS = 512, 1024


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def build_runner(build: Path, folder: Path) -> Path:
    runner = folder / "run_product"
    source = Path(__file__).with_name("run_product.c")
    includes = f"-I{source.parent.parent / 'csrc'}"
    libraries = (str(build / "libphi.a"), "-lm", "-lpthread")
    output_of("aarch64-linux-gnu-gcc", "-O2", "-static", includes, str(source), *libraries, "-o", str(runner))
    return runner


def mnemonics(runner: Path) -> dict[str, dict[int, str]]:
    """Return function -> address -> mnemonic, for the kernels."""
    functions: dict[str, dict[int, str]] = {}
    current: dict[int, str] = {}
    for line in output_of("aarch64-linux-gnu-objdump", "-d", str(runner)).splitlines():
        if found := re.match(r"[0-9a-f]+ <(phi_matmul_\w+)(?:\.\w+)*>:", line):
            current = functions.setdefault(found[1], {})
        elif re.match(r"[0-9a-f]+ <", line):
            current = {}
        elif found := re.match(r"\s+([0-9a-f]+):\s+[0-9a-f]{8}\s+([\w.]+)", line):
            current[int(found[1], 16)] = found[2]
    return functions


def executed(runner: Path, log: Path, function: dict[int, str], *arguments: str) -> tuple[int, int]:
    """Return how many instructions of a function ran, and how many of them multiply bytes."""
    within = f"{min(function):#x}..{max(function) + 3:#x}"
    options = ("-cpu", "max", "-singlestep", "-d", "exec,nochain", "-dfilter", within, "-D", str(log))
    output_of("qemu-aarch64", *options, str(runner), *arguments)
    addresses = [int(a, 16) for a in re.findall(r"\[\w+/(\w+)/", log.read_text())]
    ran = [function[a] for a in addresses if a in function]
    return len(ran), sum(name in MULTIPLIES for name in ran)


def count(runner: Path, log: Path, function: dict[int, str], tier: str, name: str, shape: tuple[str, int, int]) -> str:
    layout, n_rows, n_tokens = shape
    few, many = (
        executed(runner, log, function, tier, name, layout, str(n_rows), str(n_tokens), str(n_cols))
        for n_cols in (FEW_COLS, MANY_COLS)
    )
    blocks = (MANY_COLS - FEW_COLS) / 256 * n_rows * n_tokens
    return f"{(many[0] - few[0]) / blocks:.1f} ({(many[1] - few[1]) / blocks:.1f})"


def main() -> None:
    build = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        runner, log = build_runner(build, Path(folder)), Path(folder) / "log"
        functions = mnemonics(runner)
        print("| type | tier | packed, 1 token | 4 tokens | 64 tokens | file, 1 token | 4 tokens |")
        print("|---|---|---|---|---|---|---|")
        for name in FILE_TYPES:
            for tier in TIERS:
                cells = []
                for layout, n_rows, n_tokens in (*SHAPES, ("mmap", 4, 1), ("mmap", 4, 4)):
                    prefix = "phi_matmul_packed" if layout == "packed" else "phi_matmul"
                    function = functions.get(f"{prefix}_{name.lower()}_{tier}")
                    shape = (layout, n_rows, n_tokens)
                    cells.append(count(runner, log, function, tier, name, shape) if function else "")
                if any(cells):
                    print("|", " | ".join([name, tier, *cells]), "|", flush=True)


main()
