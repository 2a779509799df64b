"""`phi-c doctor`: the report matches the machine, and PHI_C_ISA is checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phi_c import _core, errors, hub, machine
from phi_c.bench import memory
from phi_c.cli import doctor


@pytest.fixture(autouse=True)
def quick_and_isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measure bandwidth on little memory, with one model in the cache and no profiles."""
    model = SimpleNamespace(name="smollm2", source="pypi:p", path=Path("/cache/m.gguf"), n_bytes=93_000_000)
    monkeypatch.setattr(memory, "_MAX_READ_BYTES", 16 << 20)
    monkeypatch.setattr(hub, "cached", lambda: [model])
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "cache_dir", lambda: Path("/cache"))
    monkeypatch.delenv("PHI_C_ISA", raising=False)


def run(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
    return CliRunner().invoke(doctor.command, arguments, env={"COLUMNS": "200", **(env or {})})


def report(env: Mapping[str, str] | None = None) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(run("--json", env=env).stdout)
    return parsed


def test_json_matches_the_machine() -> None:
    found = report()
    assert found["cpu"] == {
        "name": machine.cpu_name(),
        "features": _core.cpu_features(),
        "tiers": _core.tiers(),
        "tier": _core.default_tier(),
        "forced": False,
    }
    assert found["cores"] == {
        "affinity": len(machine.affinity_cpus()),
        "cgroup": machine.cgroup_cores(),
        "physical": machine.physical_cores(),
        "default_threads": machine.default_threads(),
    }
    memory = found["memory"]
    assert memory["total_bytes"] == machine.memory_total()
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]
    assert memory["read_bytes_per_second"].keys() == {"1", str(machine.default_threads())}
    assert all(1e8 < rate < 1e13 for rate in memory["read_bytes_per_second"].values())
    assert found["cache"]["models"] == [
        {"name": "smollm2", "source": "pypi:p", "path": str(Path("/cache/m.gguf")), "n_bytes": 93_000_000}
    ]
    assert found["errors"] == []
    assert found["version"] and "3." in found["python"]


def test_table_shows_cpu_models_and_bandwidth() -> None:
    result = run()
    assert result.exit_code == 0
    assert machine.cpu_name() in result.stdout
    assert "smollm2 (93.0 MB)" in result.stdout
    assert "1 thread: " in result.stdout and "GB/s" in result.stdout
    assert "in the CPU affinity" in result.stdout


@pytest.mark.parametrize("tier", _core.tiers())
def test_tier_from_the_environment(tier: str) -> None:
    cpu = report({"PHI_C_ISA": tier})["cpu"]
    assert (cpu["tier"], cpu["forced"]) == (tier, True)
    assert f"{tier} (forced by PHI_C_ISA)" in run(env={"PHI_C_ISA": tier}).stdout


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_unsupported_tier_is_an_error_but_the_report_is_printed(flags: list[str]) -> None:
    result = run(*flags, env={"PHI_C_ISA": "avx9"})
    assert isinstance(result.exception, errors.OptionError)
    assert "PHI_C_ISA is 'avx9', expected one that this machine runs: scalar" in str(result.exception)
    assert machine.cpu_name() in result.stdout
    if flags:
        found = json.loads(result.stdout)
        assert found["cpu"]["tier"] is None and found["errors"] == [str(result.exception)]


def test_empty_variable_is_ignored() -> None:
    cpu = report({"PHI_C_ISA": ""})["cpu"]
    assert (cpu["tier"], cpu["forced"]) == (_core.default_tier(), False)


def test_unreadable_cache_is_an_error_but_the_report_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise errors.CacheError("the cache folder /cache cannot be read")

    monkeypatch.setattr(hub, "cached", refuse)
    result = run("--json")
    assert isinstance(result.exception, errors.CacheError)
    found = json.loads(result.stdout)
    assert found["errors"] == ["the cache folder /cache cannot be read"]
    assert found["cpu"]["tier"] == _core.default_tier()


def test_bandwidth_is_not_measured_with_little_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 1 << 20)
    found = report()
    assert found["memory"]["available_bytes"] == 1 << 20
    assert set(found["memory"]["read_bytes_per_second"].values()) == {None}
    assert "1 thread: unknown" in run().stdout


def test_unknown_total_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_total", lambda: machine.UNKNOWN_BYTES)
    assert report()["memory"]["total_bytes"] is None
    assert "memory" in run().stdout and "unknown, " in run().stdout
