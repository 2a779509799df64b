"""What a change must pass: `nox` runs all of it, `nox -s lint` one part."""

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "sanitize", "emulate_amx", "reference"]
nox.options.default_venv_backend = "venv"
C_SOURCES = sorted(str(p) for folder in ("csrc", "tests/native", "benchmarks") for p in Path(folder).rglob("*.[ch]"))
# Those that hold our numbers against other libraries, as far as these are installed.
REFERENCE_TESTS = [
    "tests/transformers_reference",
    "tests/convert/test_safetensors_file.py",
    "tests/convert/test_vocabulary.py",
    "tests/evaluate/test_harness.py",
    "tests/quantize",
    "tests/text",
]
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
    needed = "libgguf, lm_eval, safetensors, sentencepiece, tiktoken, torch, transformers, xllamacpp"
    session.run("python", "-c", f"import {needed}")
    session.run("pytest", *(session.posargs or REFERENCE_TESTS))
    session.run("python", "benchmarks/models.py", "--check")


NATIVE = Path("build/native").resolve()
ZIG_TARGETS = [
    f"{cpu}-{system}"
    for cpu in ("x86_64", "aarch64")
    for system in ("linux-gnu.2.17", "linux-musl", "macos", "windows-gnu")
]
# All groups of the C tests but "fork": qemu-user cannot fork a process that has threads.
WITHOUT_FORK = ["dispatch", "threads", "dequantize", "vectors", "attention", "products", "forward"]


def build_c(session: nox.Session, name: str, *options: str, target: str = "all") -> Path:
    """Build the C library and its tests, warnings as errors, in a folder of their own; return the folder."""
    folder = NATIVE / name
    session.run(
        *("cmake", "-S", ".", "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DPHI_BUILD_EXTENSION=OFF", "-DPHI_BUILD_TESTS=ON", "-DPHI_WARNINGS_AS_ERRORS=ON", *options),
    )
    session.run("cmake", "--build", str(folder), "--target", target)
    return folder


@nox.session
def native(session: nox.Session) -> None:
    """The C tests: gcc, clang, ASan with UBSan, TSan."""
    session.install("cmake", "ninja")
    with_debug = "-DCMAKE_BUILD_TYPE=RelWithDebInfo"
    builds = {"gcc": ["-DCMAKE_C_COMPILER=gcc"], "asan": ["-DPHI_SANITIZE=ON", with_debug]}
    builds["tsan"] = ["-DPHI_SANITIZE_THREAD=ON", with_debug]
    clang = next((name for name in ("clang", *(f"clang-{n}" for n in range(25, 13, -1))) if shutil.which(name)), None)
    if clang:
        builds["clang"] = [f"-DCMAKE_C_COMPILER={clang}"]
    else:
        session.warn("there is no clang: the C tests run under gcc alone")
    for name, options in builds.items():
        folder = build_c(session, name, *options)
        groups = ["-R", "threads|forward|dispatch"] if name == "tsan" else []  # the others have one thread
        session.run("ctest", "--test-dir", str(folder), "--output-on-failure", *groups)


@nox.session
def qemu(session: nox.Session) -> None:
    """The C tests on aarch64 under qemu-user: a CPU that has everything, and one without dot products."""
    if not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")):
        session.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    session.install("cmake", "ninja")
    folder = build_c(session, "aarch64", "-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake")
    for cpu, tiers in (("max", "scalar,neon,dotprod,i8mm"), ("cortex-a72", "scalar,neon")):
        program = str(folder / "tests/native/phi_tests")
        session.run("qemu-aarch64", "-cpu", cpu, program, "--tiers", tiers, *WITHOUT_FORK, external=True)


@nox.session
def platforms(session: nox.Session) -> None:
    """What takes longer: every C file by zig for each platform, and the C tests as a Windows program under wine."""
    session.install("cmake", "ninja", "ziglang==0.15.2")
    where = "import ziglang, pathlib; print(pathlib.Path(ziglang.__file__).with_name('zig'))"
    zig = str(session.run("python", "-c", where, silent=True)).strip()
    for target in ZIG_TARGETS:
        options = ("-DCMAKE_TOOLCHAIN_FILE=cmake/zig.cmake", f"-DPHI_ZIG={zig}", f"-DPHI_ZIG_TARGET={target}")
        build_c(session, f"zig-{target}", *options, target="phi")
    if not (shutil.which("x86_64-w64-mingw32-gcc") and shutil.which("wine")):
        session.skip("the Windows tests need mingw and wine (Debian: gcc-mingw-w64-x86-64, wine64)")
    folder = build_c(session, "windows", "-DCMAKE_TOOLCHAIN_FILE=cmake/x86_64-w64-mingw32.cmake")
    session.run("ctest", "--test-dir", str(folder), "--output-on-failure", env={"WINEDEBUG": "-all"})
