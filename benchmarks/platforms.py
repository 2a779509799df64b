"""Generates the platform table of README.md and the tensor-type table of docs/platforms.md from test results.

    nox -s native qemu platforms           # writes results to build/native
    python benchmarks/platforms.py         # writes both tables
    python benchmarks/platforms.py --check # exit status 1 if a table differs from the results

A cell of the platform table is the strongest evidence that a tier works on a platform: "run" (the C tests passed on a
processor that has the tier), "wine", "qemu", "emulated" (AMX tiles in C, AVX-VNNI by AVX-512) or "built" (compiled
without a warning). A cell stays unchanged if the present results cannot confirm it: the session was not run, or the
processor lacks the tier. `--check --all` requires the results of every session.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILDS = ROOT / "build/native"
TIERS = ("scalar", "avx2", "avxvnni", "avx512", "amx", "amxbf16", "neon", "dotprod", "i8mm")
EVIDENCE = ("", "built", "emulated", "qemu", "wine", "run")  # weakest first
_FOOTER = "tensor types with native kernels"
BEGIN, END = "<!-- {}: made by benchmarks/platforms.py -->", "<!-- end of {} -->"


@dataclass(frozen=True)
class Platform:
    """A row of the platform table.

    results: evidence by the name of a result file in build/native/results.
    build: folder of the zig build in build/native.
    """

    name: str
    results: dict[str, str]
    build: str


PLATFORMS = (
    Platform(
        "Linux (glibc) x86_64",
        {"linux-x86_64": "run", "linux-x86_64-emulated": "emulated"},
        "zig-x86_64-linux-gnu.2.17",
    ),
    Platform("Linux (glibc) aarch64", {"linux-aarch64": "qemu"}, "zig-aarch64-linux-gnu.2.17"),
    Platform("Linux (musl) x86_64", {"musl-x86_64": "run"}, "zig-x86_64-linux-musl"),
    Platform("Linux (musl) aarch64", {"musl-aarch64": "qemu"}, "zig-aarch64-linux-musl"),
    Platform("macOS x86_64", {}, "zig-x86_64-macos"),
    Platform("macOS arm64", {}, "zig-aarch64-macos"),
    Platform("Windows x86_64", {"windows-x86_64": "wine"}, "zig-x86_64-windows-gnu"),
    Platform("Windows arm64", {}, "zig-aarch64-windows-gnu"),
)
TYPE_TABLES = ("linux-x86_64", "linux-aarch64")  # one per architecture, built with every tier


def tested_tiers(name: str) -> frozenset[str] | None:
    """Return the tiers that passed every group of C tests in a result file; None if there is no such file."""
    path = BUILDS / f"results/{name}.txt"
    if not path.exists():
        return None
    passed: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match line.split():
            case ["ok", group, tier, _, "checks"]:
                passed.setdefault(tier, set()).add(group)
    groups = set().union(*passed.values())
    return frozenset(tier for tier, done in passed.items() if done == groups)


def built_tiers(folder: str) -> frozenset[str] | None:
    """Return the tiers whose kernels a zig build contains; None without a successful build (warnings fail it)."""
    commands = BUILDS / folder / "compile_commands.json"
    if not commands.exists() or not (BUILDS / folder / "libphi.a").exists():
        return None
    files = {Path(entry["file"]) for entry in json.loads(commands.read_text(encoding="utf-8"))}
    return frozenset({"scalar"} | {file.parent.name for file in files if file.parent.parent.name == "kernels"}) & {
        *TIERS
    }


def current_evidence(platform: Platform, tier: str) -> str:
    """Return the strongest evidence in the present results."""
    found = [evidence for name, evidence in platform.results.items() if tier in (tested_tiers(name) or ())]
    found += ["built"] if tier in (built_tiers(platform.build) or ()) else []
    return max(found, key=EVIDENCE.index, default="")


def is_unverifiable(platform: Platform, tier: str, evidence: str) -> bool:
    """Return whether the present results cannot confirm a cell: no such run, or a processor without the tier."""
    if evidence == "built":
        return built_tiers(platform.build) is None
    runs = [tested_tiers(name) for name, kind in platform.results.items() if kind == evidence]
    return evidence != "" and all(run is None or tier not in run for run in runs)


def platform_table(old_cells: dict[tuple[str, str], str], ignore_better: bool) -> str:
    """Return the table of README.md.

    old_cells: the cells of the page by platform and tier.
    ignore_better: leave a nonempty cell unchanged if the results are better.
    """
    rows = []
    for platform in PLATFORMS:
        cells = []
        for tier in TIERS:
            old, new = old_cells.get((platform.name, tier), ""), current_evidence(platform, tier)
            is_worse = EVIDENCE.index(new) < EVIDENCE.index(old)
            keep_old = is_unverifiable(platform, tier, old) if is_worse else ignore_better and old != ""
            cells.append(old if keep_old else new)
        rows.append([platform.name, *cells])
    kernels = native_kernels().values()
    rows.append([_FOOTER, *(str(sum(tiers[tier] != "" for tiers in kernels)) for tier in TIERS)])
    return markdown(("platform", *TIERS), rows)


def native_kernels() -> dict[str, dict[str, str]]:
    """Return by tensor type and tier the layouts with a native product: "mmap", "packed", "mmap, packed" or "".

    Empty if the type table of an architecture is missing.
    """
    types: dict[str, dict[str, str]] = {}
    for name in TYPE_TABLES:
        path = BUILDS / f"results/{name}.types"
        if not path.exists():
            return {}
        for line in path.read_text(encoding="utf-8").splitlines():
            type_name, tier, *layouts = line.split()
            native = [layout for layout, owner in zip(("mmap", "packed"), layouts, strict=True) if owner == "own"]
            types.setdefault(type_name, dict.fromkeys(TIERS, ""))[tier] = ", ".join(native)
    return types


def type_table(types: dict[str, dict[str, str]]) -> str:
    """Return the table of docs/platforms.md."""
    return markdown(("type", *TIERS), [[name, *kernels.values()] for name, kernels in types.items()])


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def split_page(page: str, name: str) -> tuple[str, str, str]:
    """Return a page's text before, between and after the marks of a table."""
    before, begin, rest = page.partition(BEGIN.format(name) + "\n")
    table, end, after = rest.partition(END.format(name))
    if not begin or not end:
        raise SystemExit(f"no marks of the table {name!r}: expected {BEGIN.format(name)!r} and {END.format(name)!r}")
    return before + begin, table, end + after


def parse_cells(table: str) -> dict[tuple[str, str], str]:
    """Return the cells of a table by row name and column name."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    if not lines:
        return {}
    head, _, *rows = [[*line, *[""] * (len(TIERS) + 1 - len(line))] for line in lines]
    return {(row[0], column): cell for row in rows for column, cell in zip(head[1:], row[1:], strict=True)}


def main() -> int:
    """Write or check the tables; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    parser.add_argument("--all", action="store_true", help="fail if the results of any session are missing")
    arguments = parser.parse_args()

    required = [name for platform in PLATFORMS for name in platform.results] if arguments.all else [*TYPE_TABLES]
    missing = [name for name in required if tested_tiers(name) is None]
    missing += [p.build for p in PLATFORMS if arguments.all and built_tiers(p.build) is None]
    if missing or not native_kernels():
        names = ", ".join(missing) or "tensor types"
        print(f"missing results in build/native: {names}; run nox -s native qemu platforms", file=sys.stderr)
        return 1
    status = 0
    for path, name in ((ROOT / "README.md", "platforms"), (ROOT / "docs/platforms.md", "tensor types")):
        page = path.read_text(encoding="utf-8")
        before, old, after = split_page(page, name)
        if name == "platforms":
            table = platform_table(parse_cells(old), ignore_better=arguments.check)
        else:
            table = type_table(native_kernels())
        if arguments.check and table != old:
            print(f"{path.relative_to(ROOT)} is out of date; expected:\n{table}", file=sys.stderr)
            status = 1
        elif not arguments.check:
            path.write_text(before + table + after, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
