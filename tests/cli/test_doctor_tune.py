"""`phi-c doctor --tune`: the profile that it stores is the one that loads use, and an interrupt stores nothing."""

import json
from functools import partial
from pathlib import Path

import pytest
from run_cli import invoke, invoke_json

import phi_c
from phi_c import _core, errors
from phi_c.bench import tuning as bench_tuning
from phi_c.cli import doctor
from phi_c.model import tuning
from tiny_gguf import write_tiny

TIERS = [tier for tier in _core.tiers() if _core.max_exact_batch(tier) is None]
needs_packing = pytest.mark.skipif(TIERS == ["scalar"], reason="the scalar tier packs no weights")
run = partial(invoke, doctor.command)
report = partial(invoke_json, doctor.command)


@pytest.fixture(autouse=True)
def quick_and_isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measure few and small passes; store the profile in a temporary folder."""
    monkeypatch.delenv("PHI_C_TUNE")
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "BUDGET_SECONDS", 0.01)
    monkeypatch.setattr(bench_tuning, "_PREFETCH_SECONDS", 0.05)
    monkeypatch.setattr(bench_tuning, "_ROUNDS", {1: 1, 8: 1, 40: 1})
    monkeypatch.setattr(bench_tuning, "_SMALL_BATCH_ROUNDS", 1)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf")


@needs_packing
def test_stores_the_profile_that_loads_use(tiny: Path) -> None:
    found = report("--tune", "-m", tiny, "--threads", 1, "--tier", TIERS[-1])
    assert (found["key"]["n_threads"], found["key"]["tier"]) == (1, TIERS[-1])
    names = {change["name"]: change for change in found["changes"]}
    assert {"prefetch, Q4_K, 1", "prefetch, Q4_K, 9-16", "largest small batch, Q4_K", "spins"} <= names.keys()
    assert all(change["gain"] > 0 for change in names.values())
    stored = tuning.load(Path(found["path"]))
    assert stored is not None
    with phi_c.load(tiny, n_threads=1, tier=TIERS[-1]) as model:
        assert model.tuning == "cache"
        used = _core.get_tuning(model.engine.model)
    assert used == stored.settings()
    for field in ("max_task_rows", "tasks_per_thread", "spins"):
        assert str(getattr(used, field)) == names[field.replace("_", " ")]["new"]
    assert str(used.max_small_batch["Q4_K"]) == names["largest small batch, Q4_K"]["new"]


@needs_packing
def test_table_names_the_settings_and_the_file(tiny: Path) -> None:
    result = run("--tune", "-m", tiny, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "tasks per thread" in result.stdout and "Stored in " in result.stdout
    (path,) = tuning.profile_folder().iterdir()
    assert str(path) in result.stdout
    (listed,) = json.loads(run("--json").stdout)["cache"]["tuning"]
    assert (listed["n_threads"], listed["types"]) == (1, ["Q4_K"])
    assert "Q4_K" in run().stdout


@needs_packing
def test_random_weights_cover_every_packed_type(monkeypatch: pytest.MonkeyPatch) -> None:
    small = bench_tuning.random_model(1, None, layers_per_type=1, n_embd=768)
    monkeypatch.setattr("phi_c.cli.tuning.random_model", lambda n_threads, tier: small)
    found = report("--tune", "--threads", 1)
    types = {change["name"].split(", ")[1] for change in found["changes"] if change["name"].startswith("prefetch")}
    assert {"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"} <= types


def test_too_little_memory_for_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi_c.machine.memory_available", lambda: 1 << 20)
    result = run("--tune")
    assert isinstance(result.exception, errors.MemoryLimitError) and "(-m)" in str(result.exception)


@needs_packing
def test_unwritable_cache_is_an_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in place of the folder")
    result = run("--tune", "-m", tiny, "--threads", 1)
    assert isinstance(result.exception, errors.CacheError) and "PHI_C_CACHE" in str(result.exception)


@needs_packing
def test_interrupt_leaves_the_profile_as_it_is(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with phi_c.load(tiny, n_threads=1):
        (path,) = tuning.profile_folder().iterdir()
    before = path.read_bytes()

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_tuning, "_choose_field", interrupt)
    assert run("--tune", "-m", tiny, "--threads", 1).exit_code != 0
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "2"], "need --tune"),
        (["--model", "smollm2"], "need --tune"),
        (["--tier", "scalar"], "need --tune"),
        (["--tune", "--threads", "0"], "n_threads is 0"),
        (["--tune", "--tier", "avx9"], "tier is 'avx9'"),
        (["--tune", "--tier", "scalar"], "expected one with packed weights"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in result.output + str(result.exception)
