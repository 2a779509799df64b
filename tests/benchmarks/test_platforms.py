"""Tests of benchmarks/platforms.py on made-up results: the tables it writes, and when it reports them out of date."""

import json
from pathlib import Path

import pytest

import platforms

GROUPS = ("vectors", "products")


def write_result(name: str, tiers: str, *, failed: str = "") -> None:
    """Write the output of the C tests. failed: a tier whose last group did not pass."""
    lines = [f"ok  {group}  {tier}  9 checks" for group in GROUPS for tier in tiers.split()]
    lines = [line for line in lines if line != f"ok  {GROUPS[-1]}  {failed}  9 checks"]
    path = platforms.BUILDS / f"results/{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["tiers some; cpu some", *lines]))


def write_types(name: str, text: str) -> None:
    (platforms.BUILDS / f"results/{name}.types").write_text(text)


def write_build(target: str, *tiers: str) -> None:
    folder = platforms.BUILDS / f"zig-{target}"
    folder.mkdir(parents=True)
    files = [f"/csrc/kernels/{tier}/table.c" for tier in tiers] + ["/csrc/forward.c", "/csrc/kernels/generic/pack.c"]
    (folder / "compile_commands.json").write_text(json.dumps([{"file": file} for file in files]))
    (folder / "libphi.a").touch()


@pytest.fixture(autouse=True)
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with empty tables, and results of two architectures and one build."""
    monkeypatch.setattr(platforms, "ROOT", tmp_path)
    monkeypatch.setattr(platforms, "BUILDS", tmp_path / "build")
    for page, name in (("README.md", "platforms"), ("docs/platforms.md", "tensor types")):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        marks = platforms.BEGIN.format(name), platforms.END.format(name)
        (tmp_path / page).write_text("before\n{}\n{}\nafter\n".format(*marks))
    write_result("linux-x86_64", "scalar avx2 avx512")
    write_result("linux-x86_64-emulated", "scalar avx2 avx512 amx")
    write_result("linux-aarch64", "scalar neon")
    write_types("linux-x86_64", "F32 scalar own -\nF32 avx2 own own\nQ4_K scalar own -\nQ4_K avx2 - own\n")
    write_types("linux-aarch64", "F32 scalar own -\nF32 neon own -\nQ4_K scalar own -\nQ4_K neon - -\n")
    write_build("aarch64-macos", "neon")


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["platforms.py", *arguments])
    return platforms.main()


def readme_cell(platform: str, tier: str) -> str:
    _, table, _ = platforms.split_page((platforms.ROOT / "README.md").read_text(), "platforms")
    return platforms.parse_cells(table)[platform, tier]


def test_tables_show_strongest_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_script(monkeypatch) == 0
    x86, arm = "Linux (glibc) x86_64", "Linux (glibc) aarch64"
    assert [readme_cell(x86, tier) for tier in ("scalar", "avx512", "amx", "neon")] == ["run", "run", "emulated", ""]
    assert [readme_cell(arm, tier) for tier in ("scalar", "neon", "dotprod")] == ["qemu", "qemu", ""]
    assert [readme_cell("macOS arm64", tier) for tier in ("scalar", "neon", "avx2")] == ["built", "built", ""]
    footer = [readme_cell(platforms._FOOTER, tier) for tier in ("scalar", "avx2", "neon", "i8mm")]
    assert footer == ["2", "2", "1", "0"]
    page = (platforms.ROOT / "docs/platforms.md").read_text()
    assert "| F32 | mmap | mmap, packed |  |  |  |  | mmap |  |  |" in page
    assert page.startswith("before\n") and page.endswith("after\n")
    assert run_script(monkeypatch, "--check") == 0


def test_check_fails_on_outdated_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_script(monkeypatch)
    write_result("linux-aarch64", "scalar neon dotprod")
    assert run_script(monkeypatch, "--check") == 1
    assert "README.md is out of date" in capsys.readouterr().err
    write_result("linux-aarch64", "scalar neon")
    write_types("linux-aarch64", "F32 scalar own -\nF32 neon - -\n")
    assert run_script(monkeypatch, "--check") == 1


def test_failed_tier_has_empty_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    write_result("linux-aarch64", "scalar neon", failed="neon")
    run_script(monkeypatch)
    assert readme_cell("Linux (glibc) aarch64", "neon") == ""


def test_check_accepts_results_of_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with fewer tiers cannot refute a cell; one with more tiers does not make a table out of date."""
    run_script(monkeypatch)
    write_result("linux-x86_64", "scalar avx2")
    assert run_script(monkeypatch, "--check") == 0
    write_result("linux-x86_64", "scalar avx2 avx512 amx")
    assert run_script(monkeypatch, "--check") == 0
    assert run_script(monkeypatch) == 0
    assert readme_cell("Linux (glibc) x86_64", "amx") == "run"


def test_missing_results_are_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(monkeypatch, "--check", "--all") == 1
    assert "zig-x86_64-macos" in capsys.readouterr().err
    (platforms.BUILDS / "results/linux-aarch64.txt").unlink()
    assert run_script(monkeypatch) == 1
    assert "linux-aarch64" in capsys.readouterr().err
