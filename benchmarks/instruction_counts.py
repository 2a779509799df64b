"""Count the instructions that ARM kernels execute per super-block: qemu cannot measure time.

    python benchmarks/instruction_counts.py BUILD_DIR

BUILD_DIR is a build of the C library for aarch64 (docs/arm.md). Each product runs under qemu-aarch64, which logs the
address of every instruction it executes; the disassembly of the kernel gives their mnemonics. A product runs with 1024
and with 512 columns: the difference is the cost of 512 columns without the product's prologue and epilogue.

Prints a Markdown table: instructions per row, token and 256 columns, in brackets those that multiply bytes.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q2_K", "Q3_K")
TIERS = ("neon", "dotprod", "i8mm")
BYTE_MULTIPLIES = {"smull", "smull2", "smlal", "smlal2", "sdot", "smmla"}
# Column title, weight layout, rows, tokens.
COLUMNS = (
    ("packed, decode", "packed", 16, 1),
    ("packed, batch of 4", "packed", 16, 4),
    ("packed, prefill of 64", "packed", 16, 64),
    ("mmap, decode", "mmap", 4, 1),
    ("mmap, batch of 4", "mmap", 4, 4),
)
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


def disassemble(runner: Path) -> dict[str, dict[int, str]]:
    """Return kernel function -> address -> mnemonic."""
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


def count_executed(runner: Path, log: Path, function: dict[int, str], *arguments: str) -> tuple[int, int]:
    """Run a product; return the number of executed instructions of `function`, and how many of them multiply bytes."""
    address_range = f"{min(function):#x}..{max(function) + 3:#x}"
    options = ("-cpu", "max", "-singlestep", "-d", "exec,nochain", "-dfilter", address_range, "-D", str(log))
    output_of("qemu-aarch64", *options, str(runner), *arguments)
    addresses = [int(a, 16) for a in re.findall(r"\[\w+/(\w+)/", log.read_text())]
    executed = [function[a] for a in addresses if a in function]
    return len(executed), sum(name in BYTE_MULTIPLIES for name in executed)


def format_cell(runner: Path, log: Path, function: dict[int, str], arguments: list[str], n_pairs: int) -> str:
    """Return the counts per 256 columns. n_pairs: number of (row, token) pairs of the product."""
    few, many = (count_executed(runner, log, function, *arguments, str(n_cols)) for n_cols in (FEW_COLS, MANY_COLS))
    blocks = (MANY_COLS - FEW_COLS) / 256 * n_pairs
    return f"{(many[0] - few[0]) / blocks:.1f} ({(many[1] - few[1]) / blocks:.1f})"


def main() -> None:
    build = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        runner, log = build_runner(build, Path(folder)), Path(folder) / "log"
        functions = disassemble(runner)
        print("| type | tier |", " | ".join(title for title, *_ in COLUMNS), "|")
        print("|---" * (2 + len(COLUMNS)) + "|")
        for type_name in TYPES:
            for tier in TIERS:
                cells = []
                for _, layout, n_rows, n_tokens in COLUMNS:
                    prefix = "phi_matmul_packed" if layout == "packed" else "phi_matmul"
                    function = functions.get(f"{prefix}_{type_name.lower()}_{tier}")
                    arguments = [tier, type_name, layout, str(n_rows), str(n_tokens)]
                    cells.append(format_cell(runner, log, function, arguments, n_rows * n_tokens) if function else "")
                if any(cells):
                    print("|", " | ".join([type_name, tier, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
