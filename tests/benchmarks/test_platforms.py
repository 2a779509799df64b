"""benchmarks/platforms.py on made-up results: what it writes, and what it takes for out of date."""

import json
from pathlib import Path

import pytest

import platforms

GROUPS = ("vectors", "products")


def result(name: str, tiers: str, *, failed: str = "") -> None:
    """Leave what the C tests print; of a failed tier the last group is missing."""
    lines = [f"ok  {group}  {tier}  9 checks" for group in GROUPS for tier in tiers.split()]
    lines = [line for line in lines if line != f"ok  {GROUPS[-1]}  {failed}  9 checks"]
    path = platforms.BUILDS / f"results/{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["tiers some; cpu some", *lines]))


def types(name: str, text: str) -> None:
    (platforms.BUILDS / f"results/{name}.types").write_text(text)


def build(target: str, *tiers: str) -> None:
    folder = platforms.BUILDS / f"zig-{target}"
    folder.mkdir(parents=True)
    files = [f"/csrc/kernels/{tier}/table.c" for tier in tiers] + ["/csrc/forward.c", "/csrc/kernels/generic/pack.c"]
    (folder / "compile_commands.json").write_text(json.dumps([{"file": file} for file in files]))
    (folder / "libphi.a").touch()


@pytest.fixture(autouse=True)
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "ROOT", tmp_path)
    monkeypatch.setattr(platforms, "BUILDS", tmp_path / "build")
    for page, name in (("README.md", "platforms"), ("docs/platforms.md", "tensor types")):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        marks = platforms.BEGIN.format(name), platforms.END.format(name)
        (tmp_path / page).write_text("before\n{}\n{}\nafter\n".format(*marks))
    result("linux-x86_64", "scalar avx2 avx512")
    result("linux-x86_64-emulated", "scalar avx2 avx512 amx")
    result("linux-aarch64", "scalar neon")
    types("linux-x86_64", "F32 scalar own -\nF32 avx2 own own\nQ4_K scalar own -\nQ4_K avx2 - own\n")
    types("linux-aarch64", "F32 scalar own -\nF32 neon own -\nQ4_K scalar own -\nQ4_K neon - -\n")
    build("aarch64-macos", "neon")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["platforms.py", *arguments])
    return platforms.main()


def cell(platform: str, tier: str) -> str:
    _, table, _ = platforms.between((platforms.ROOT / "README.md").read_text(), "platforms")
    return platforms.stated_cells(table)[platform, tier]


def test_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch) == 0
    x86, arm = "Linux (glibc) x86_64", "Linux (glibc) aarch64"
    assert [cell(x86, tier) for tier in ("scalar", "avx512", "amx", "neon")] == ["run", "run", "emulated", ""]
    assert [cell(arm, tier) for tier in ("scalar", "neon", "dotprod")] == ["qemu", "qemu", ""]
    assert [cell("macOS arm64", tier) for tier in ("scalar", "neon", "avx2")] == ["built", "built", ""]
    assert [cell(platforms._FOOTER, tier) for tier in ("scalar", "avx2", "neon", "i8mm")] == ["2", "2", "1", "0"]
    page = (platforms.ROOT / "docs/platforms.md").read_text()
    assert "| F32 | mmap | mmap, packed |  |  |  |  | mmap |  |  |" in page
    assert page.startswith("before\n") and page.endswith("after\n")
    assert run(monkeypatch, "--check") == 0


def test_what_is_out_of_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch)
    result("linux-aarch64", "scalar neon dotprod")
    assert run(monkeypatch, "--check") == 1
    assert "README.md is out of date" in capsys.readouterr().err
    result("linux-aarch64", "scalar neon")
    types("linux-aarch64", "F32 scalar own -\nF32 neon - -\n")
    assert run(monkeypatch, "--check") == 1


def test_a_tier_that_fails_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    result("linux-aarch64", "scalar neon", failed="neon")
    run(monkeypatch)
    assert cell("Linux (glibc) aarch64", "neon") == ""


def test_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with fewer tiers cannot say that a cell is wrong, one with more does not ask for a better one."""
    run(monkeypatch)
    result("linux-x86_64", "scalar avx2")
    assert run(monkeypatch, "--check") == 0
    result("linux-x86_64", "scalar avx2 avx512 amx")
    assert run(monkeypatch, "--check") == 0
    assert run(monkeypatch) == 0
    assert cell("Linux (glibc) x86_64", "amx") == "run"


def test_missing_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--check", "--all") == 1
    assert "zig-x86_64-macos" in capsys.readouterr().err
    (platforms.BUILDS / "results/linux-aarch64.txt").unlink()
    assert run(monkeypatch) == 1
    assert "linux-aarch64" in capsys.readouterr().err
