"""Writes the tables of platforms, tiers and tensor types, in README.md and docs/platforms.md, from test results.

    nox -s native qemu platforms           # leave their results in build/native
    python benchmarks/platforms.py         # write both tables
    python benchmarks/platforms.py --check # exit status 1 where the pages say other than what was found

A cell is the best that was seen: the C tests passed on a processor that has the tier, under wine, under qemu, with
the instructions emulated in C, or the code was compiled without a warning. A cell that cannot be made again here (no
such session was run, or this processor lacks the tier) stays as it stands; `--check --all` wants the results of every
session.
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
WORDS = ("", "built", "emulated", "qemu", "wine", "run")  # from no evidence to the best
_FOOTER = "tensor types with kernels of the tier's own"
BEGIN, END = "<!-- {}: made by benchmarks/platforms.py -->", "<!-- end of {} -->"


@dataclass(frozen=True)
class Platform:
    """A row. results: word by name of a result file; build: the folder of zig's build."""

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
TYPE_TABLES = ("linux-x86_64", "linux-aarch64")  # whose compilers build every tier of their architecture


def tested_tiers(name: str) -> frozenset[str] | None:
    """Return the tiers whose every group of C tests passed in a run, None where there was none."""
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
    """Return the tiers that a build has kernels of, None where there was none. A build with warnings has no library."""
    commands = BUILDS / folder / "compile_commands.json"
    if not commands.exists() or not (BUILDS / folder / "libphi.a").exists():
        return None
    files = {Path(entry["file"]) for entry in json.loads(commands.read_text(encoding="utf-8"))}
    return frozenset({"scalar"} | {file.parent.name for file in files if file.parent.parent.name == "kernels"}) & {
        *TIERS
    }


def fresh_cell(platform: Platform, tier: str) -> str:
    """Return the best word that today's results give."""
    words = [word for name, word in platform.results.items() if tier in (tested_tiers(name) or ())]
    words += ["built"] if tier in (built_tiers(platform.build) or ()) else []
    return max(words, key=WORDS.index, default="")


def is_missing(platform: Platform, tier: str, word: str) -> bool:
    """Whether what a cell says could not be seen today: no such run, or on a processor without the tier."""
    if word == "built":
        return built_tiers(platform.build) is None
    runs = [tested_tiers(name) for name, told in platform.results.items() if told == word]
    return word != "" and all(run is None or tier not in run for run in runs)


def platform_table(stated: dict[tuple[str, str], str], keep_lower: bool) -> str:
    """Return the table of README.md. keep_lower: a better result than a cell says leaves the cell as it is."""
    rows = []
    for platform in PLATFORMS:
        cells = []
        for tier in TIERS:
            old, new = stated.get((platform.name, tier), ""), fresh_cell(platform, tier)
            worse = WORDS.index(new) < WORDS.index(old)
            kept = (worse and is_missing(platform, tier, old)) or (keep_lower and not worse and old != "")
            cells.append(old if kept else new)
        rows.append([platform.name, *cells])
    kernels = type_kernels().values()
    rows.append([_FOOTER, *(str(sum(tiers[tier] != "" for tiers in kernels)) for tier in TIERS)])
    return markdown(("platform", *TIERS), rows)


def type_kernels() -> dict[str, dict[str, str]]:
    """Return by type and tier which layouts have a product of the tier's own: "mmap", "packed", both or "".

    Empty where the programs of both architectures have not told.
    """
    types: dict[str, dict[str, str]] = {}
    for name in TYPE_TABLES:
        path = BUILDS / f"results/{name}.types"
        if not path.exists():
            return {}
        for line in path.read_text(encoding="utf-8").splitlines():
            type_name, tier, *layouts = line.split()
            own = [word for word, whose in zip(("mmap", "packed"), layouts, strict=True) if whose == "own"]
            types.setdefault(type_name, dict.fromkeys(TIERS, ""))[tier] = ", ".join(own)
    return types


def type_table(types: dict[str, dict[str, str]]) -> str:
    """Return the table of docs/platforms.md."""
    return markdown(("type", *TIERS), [[name, *kernels.values()] for name, kernels in types.items()])


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def between(page: str, name: str) -> tuple[str, str, str]:
    """Return what stands before, between and after a table's marks."""
    before, begin, rest = page.partition(BEGIN.format(name) + "\n")
    table, end, after = rest.partition(END.format(name))
    if not begin or not end:
        raise SystemExit(f"the marks of the table {name!r} are missing")
    return before + begin, table, end + after


def stated_cells(table: str) -> dict[tuple[str, str], str]:
    """Return the cells of a table by row and column."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    if not lines:
        return {}
    head, _, *rows = [[*line, *[""] * (len(TIERS) + 1 - len(line))] for line in lines]
    return {(row[0], column): cell for row in rows for column, cell in zip(head[1:], row[1:], strict=True)}


def main() -> int:
    """Write or check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a page is out of date")
    parser.add_argument("--all", action="store_true", help="fail where a session has left no result")
    arguments = parser.parse_args()

    needed = [name for platform in PLATFORMS for name in platform.results] if arguments.all else [*TYPE_TABLES]
    missing = [name for name in needed if tested_tiers(name) is None]
    missing += [p.build for p in PLATFORMS if arguments.all and built_tiers(p.build) is None]
    if missing or not type_kernels():
        print(f"no results in build/native of: {', '.join(missing) or 'tensor types'}", file=sys.stderr)
        return 1
    status = 0
    for path, name in ((ROOT / "README.md", "platforms"), (ROOT / "docs/platforms.md", "tensor types")):
        page = path.read_text(encoding="utf-8")
        before, old, after = between(page, name)
        table = (
            platform_table(stated_cells(old), arguments.check) if name == "platforms" else type_table(type_kernels())
        )
        if arguments.check and table != old:
            print(f"{path.relative_to(ROOT)} is out of date; it would be:\n{table}", file=sys.stderr)
            status = 1
        elif not arguments.check:
            path.write_text(before + table + after, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
