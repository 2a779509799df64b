"""What a change must pass: `nox` runs all of it, `nox -s lint` one part."""

import os
import subprocess
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "sanitize", "emulate_amx", "reference"]
nox.options.default_venv_backend = "venv"
C_SOURCES = sorted(str(p) for p in Path("csrc").rglob("*.[ch]"))
PYTHON = ["src", "tests", "benchmarks", "noxfile.py"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style of Python and C, and the direction of imports."""
    session.install(".[dev]")
    session.run("ruff", "check", *PYTHON)
    session.run("ruff", "format", "--check", *PYTHON)
    session.run("clang-format", "--dry-run", "-Werror", *C_SOURCES)
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package, and of the stub against the compiled module."""
    session.install(".[dev]")
    session.run("mypy")
    session.run("python", "-m", "mypy.stubtest", "phi_c._core", "--allowlist", "tests/stubtest_allowlist.txt")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests on a build whose compiler warnings are errors."""
    session.install("-C", "cmake.define.PHI_WARNINGS_AS_ERRORS=ON", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Kernels, forward passes and damaged files under ASan and UBSan (gcc)."""
    session.install("-C", "cmake.define.PHI_SANITIZE=ON", "-C", "cmake.build-type=RelWithDebInfo", ".[test]")
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    session.run(
        "pytest",
        *(session.posargs or ["tests/core", "tests/model", "tests/quantize/test_quant_rows.py", "-k", "not smollm2"]),
        env={
            "LD_PRELOAD": " ".join(libraries),
            # The interpreter keeps memory until it exits: leaks are not ours to report.
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "PYTHONMALLOC": "malloc",
            "PATH": os.environ["PATH"],
        },
    )


@nox.session
def emulate_amx(session: nox.Session) -> None:
    """Kernels and forward passes of amx and amxbf16, tiles emulated in C, and avxvnni, by AVX-512's instruction."""
    # A build folder of its own: CMake would remember the option for the next build.
    session.install(
        *("-C", "cmake.define.PHI_EMULATE_AMX=ON", "-C", "cmake.define.PHI_AVXVNNI_BY_AVX512=ON"),
        *("-C", "cmake.define.PHI_WARNINGS_AS_ERRORS=ON"),
        *("-C", "build-dir=build/emulate_amx", ".[test]"),
    )
    tiers = session.run("python", "-c", "from phi_c import _core; print(*_core.tiers())", silent=True)
    if "amx" not in str(tiers).split():
        session.skip("all need AVX-512 VNNI, which this machine lacks")
    # "amx" means amxbf16 too, which is there where the machine has AVX512-BF16.
    session.run("pytest", *(session.posargs or ["tests/core", "-k", "amx or avxvnni"]))


@nox.session
def reference(session: nox.Session) -> None:
    """Converted models against transformers and llama.cpp, and docs/models.md against what the code gives."""
    session.install("-C", "cmake.define.PHI_WARNINGS_AS_ERRORS=ON", ".[reference]")
    # Without these the tests would be left out, and nobody would see it.
    session.run("python", "-c", "import safetensors, sentencepiece, torch, transformers, xllamacpp")
    others = [f"tests/convert/test_{name}.py" for name in ("safetensors_file", "vocabulary")]  # with those libraries
    session.run("pytest", *(session.posargs or ["tests/transformers_reference", *others]))
    session.run("python", "benchmarks/models.py", "--check")
