"""Rules of the tree that no other checker knows: what CONTRIBUTING.md points to exists, and each room has one owner."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE, KERNELS = ROOT / "src/phi_c", ROOT / "csrc/kernels"

if not (ROOT / "CONTRIBUTING.md").exists():
    pytest.skip("not a checkout: the documents are not there", allow_module_level=True)


def includes(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in folder.rglob("*.[ch]"):
        for name in re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text(encoding="utf-8")):
            yield path.relative_to(ROOT), name


def test_paths_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("## Where things go") : text.index("## Dependencies")]
    paths = re.findall(r"`((?:src|csrc|tests)/[^`]+)`", table)
    assert len(paths) >= 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_avx512_tiers_include_nothing_of_avx2() -> None:
    found = [
        f"{path}: {name}"
        for folder in ("avx512", "amx", "amxbf16")
        for path, name in includes(KERNELS / folder)
        if "avx2/" in name
    ]
    assert found == []


def test_intrinsics_are_in_kernels_only() -> None:
    found = [
        f"{path}: {name}"
        for path, name in includes(ROOT / "csrc")
        if name in ("immintrin.h", "arm_neon.h") and "kernels" not in path.parts
    ]
    assert found == []


def test_kernels_neither_allocate_nor_start_threads() -> None:
    calls = re.compile(r"\b(?:malloc|calloc|realloc|free|getenv|pthread_\w+)\(")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in KERNELS.rglob("*.[ch]")
        for match in calls.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def classes(name: str) -> list[str]:
    return [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name == name
    ]


def test_one_plan_and_one_table_of_architectures() -> None:
    assert classes("Plan") == ["gguf/writer.py"]
    assert classes("Architecture") == ["model/architectures.py"]


def test_only_gguf_knows_the_file_format() -> None:
    found = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r'b"GGUF"|GGUFWriter|GGUFReader', path.read_text(encoding="utf-8"))
    ]
    assert set(found) <= {"gguf/types.py", "gguf/reader.py", "gguf/writer.py"}
    assert found
