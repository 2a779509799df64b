"""Run-time tuning: profiles are stored, merged and read again; corrupt ones are measured again; bits never change."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi_c
from phi_c import _core, machine
from phi_c._core import Prefetch
from phi_c.errors import OptionError
from phi_c.model import tuning
from tiny_gguf import write_tiny

TOKENS = [3, 50, 7, 20, 9]
MEASURED = "measured in "
ODD = Prefetch(4096, 16384, True)  # no candidate: a choice that only a stored profile can have


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tune with a short budget and a cache folder of the test's own."""
    monkeypatch.delenv("PHI_C_TUNE")
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "BUDGET_SECONDS", 0.02)
    set_clear(monkeypatch, True)


def set_clear(monkeypatch: pytest.MonkeyPatch, is_clear: bool) -> None:
    """Make measurements clear or not, which on a busy machine is chance."""

    def tune(*args: Any) -> tuple[_core.Tuning, list[_core.TuneResult]]:
        settings, results = _core.tune(*args)
        return settings, [result._replace(is_clear=is_clear) for result in results]

    monkeypatch.setattr(tuning, "tune", tune)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny(folder / f"{name}.gguf", weight_type=name) for name in ("Q4_K", "Q8_0")}


def load(path: Path, **options: object) -> phi_c.LLM:
    return phi_c.load(path, tier=packing_tier(), n_threads=1, **options)  # type: ignore[arg-type]


def packing_tier() -> str:
    """Return the best tier that packs weights and is exact."""
    tiers = [tier for tier in _core.tiers() if _core.max_exact_batch(tier) is None]
    return tiers[-1]


needs_packing = pytest.mark.skipif(packing_tier() == "scalar", reason="the scalar tier packs no weights")


@pytest.fixture
def profile(files: dict[str, Path]) -> Iterator[Path]:
    """Yield the file of a profile that the first load has written."""
    with load(files["Q4_K"]) as model:
        assert model.tuning.startswith(MEASURED) and model.tuning.endswith(" s")
    (path,) = tuning.profile_folder().iterdir()
    yield path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def settings(model: phi_c.LLM) -> _core.Tuning:
    return _core.get_tuning(model.engine.model)


@needs_packing
def test_first_load_measures_and_later_loads_use_the_profile(files: dict[str, Path], profile: Path) -> None:
    stored = json.loads(profile.read_text())
    assert stored["key"] == {
        "cpu": machine.cpu_name(),
        "features": ",".join(_core.cpu_features()),
        "n_threads": 1,
        "tier": packing_tier(),
        "version": tuning.key_of(load(files["Q4_K"]).engine.model).version,
    }
    for n, choice in stored["prefetch"]["Q4_K"].items():
        assert Prefetch(**choice) in _core.prefetch_candidates(int(n))
    by_class = {str(n): ODD._asdict() for n in _core.BATCH_CLASSES}
    edit(profile, prefetch=stored["prefetch"] | {"Q4_K": by_class}, spins=77)
    with load(files["Q4_K"]) as model:
        assert model.tuning == "cache"
        assert settings(model).prefetch["Q4_K"] == (ODD,) * len(_core.BATCH_CLASSES)
        assert settings(model).spins == 77
        assert settings(model).max_task_rows == _core.default_tuning().max_task_rows


@needs_packing
def test_unclear_measurements_are_not_stored(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    set_clear(monkeypatch, False)
    for _ in range(2):
        with load(files["Q4_K"]) as model:
            assert model.tuning.startswith(MEASURED) and "again at the next load for Q4_K" in model.tuning
    set_clear(monkeypatch, True)
    for source in (MEASURED, "cache"):
        with load(files["Q4_K"]) as model:
            assert model.tuning.startswith(source) and "again" not in model.tuning


@needs_packing
def test_types_of_another_model_are_added_to_the_profile(files: dict[str, Path], profile: Path) -> None:
    edit(profile, max_task_rows=128)
    before = json.loads(profile.read_text())
    with load(files["Q8_0"]) as model:
        assert model.tuning.startswith(MEASURED)
        assert settings(model).max_task_rows == 128
    after = json.loads(profile.read_text())
    assert after["prefetch"].keys() == before["prefetch"].keys() | {"Q8_0"}
    assert after["prefetch"]["Q4_K"] == before["prefetch"]["Q4_K"] and after["max_task_rows"] == 128
    for path in files.values():
        with load(path) as model:
            assert model.tuning == "cache"


@needs_packing
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 2}', "[" * 100_000, "\0\xff"],
    ids=["empty", "truncated", "array", "null", "incomplete", "nested", "binary"],
)
def test_corrupt_profile_is_measured_again(files: dict[str, Path], profile: Path, content: str) -> None:
    profile.write_text(content, encoding="latin-1")
    with load(files["Q4_K"]) as model:
        assert model.tuning.startswith(MEASURED)
    with load(files["Q4_K"]) as model:
        assert model.tuning == "cache"


@needs_packing
@pytest.mark.parametrize(
    "changes",
    [
        {"format": 3},
        {"spins": -1},
        {"spins": "many"},
        {"max_task_rows": 33},
        {"tasks_per_thread": 0},
        {"tasks_per_thread": 1.5},
        {"max_small_batch": {"Q4_K": 17}},
        {"max_small_batch": {"Q4_K": 1 << 70}},
        {"prefetch": {"Q9_Z": {}}},
        {"prefetch": {"Q4_K": {"1": {"l1_bytes": 0}}}},
        {"prefetch": {"Q4_K": {str(n): {"l1_bytes": -1, "l2_bytes": 0, "next_page": False} for n in (1, 4, 8, 16)}}},
        {"prefetch": {"Q4_K": {str(n): {"l1_bytes": 0, "l2_bytes": "8", "next_page": False} for n in (1, 4, 8, 16)}}},
        {"key": {"cpu": "another", "features": "", "n_threads": 1, "tier": "avx2", "version": "0"}},
        {"key": {"cpu": "incomplete"}},
    ],
)
def test_profile_with_other_contents_is_measured_again(
    files: dict[str, Path], profile: Path, changes: dict[str, object]
) -> None:
    edit(profile, **changes)
    with load(files["Q4_K"]) as model:
        assert model.tuning.startswith(MEASURED)
        settings(model)
    assert json.loads(profile.read_text())["format"] == 2


@needs_packing
@pytest.mark.parametrize("blocked", ["cache", "cache/tuning"])
def test_load_works_without_a_cache_folder(
    files: dict[str, Path], tmp_path: Path, blocked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file in place of the folder")
    with load(files["Q4_K"]) as model:
        assert model.tuning.startswith(MEASURED)
        assert model.tuning.endswith(", not stored: the cache folder is not writable")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuning, "cache_dir", no_home)
    with load(files["Q4_K"]) as model:
        assert model.tuning.endswith("not writable")


@needs_packing
def test_off_and_force(files: dict[str, Path], profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = profile.read_text()
    edit(profile, spins=77)
    monkeypatch.setenv("PHI_C_TUNE", "off")
    with load(files["Q4_K"]) as model:
        assert model.tuning == "defaults (PHI_C_TUNE=off)" and settings(model) == _core.default_tuning()
    monkeypatch.setenv("PHI_C_TUNE", "force")
    by_class = {str(n): ODD._asdict() for n in _core.BATCH_CLASSES}
    edit(profile, prefetch=json.loads(stored)["prefetch"] | {"Q4_K": by_class})
    with load(files["Q4_K"]) as model:
        assert model.tuning.startswith(MEASURED)
        assert ODD not in settings(model).prefetch["Q4_K"] and settings(model).spins == 77
    monkeypatch.setenv("PHI_C_TUNE", "")
    with load(files["Q4_K"]) as model:
        assert model.tuning == "cache"


def test_another_value_is_an_error(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI_C_TUNE", "on")
    with pytest.raises(OptionError, match=r"^PHI_C_TUNE is 'on', expected one of off, force$"):
        load(files["Q4_K"])


def test_layout_mmap_uses_the_defaults(files: dict[str, Path], tmp_path: Path) -> None:
    with load(files["Q4_K"], layout="mmap") as model:
        assert model.tuning == "defaults (the weights are not packed)"
        assert settings(model) == _core.default_tuning()
    assert not (tmp_path / "cache").exists()


@needs_packing
def test_layout_packed_cache_is_tuned(files: dict[str, Path]) -> None:
    for _ in range(2):  # written, then mapped
        with load(files["Q4_K"], layout="packed-cache") as model:
            assert settings(model).prefetch["Q4_K"][0] in _core.prefetch_candidates(1)
    assert model.tuning == "cache"


@needs_packing
def test_no_setting_changes_a_bit(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI_C_TUNE", "off")
    with phi_c.load(files["Q4_K"], n_threads=2) as model:
        expected = model.logits(TOKENS * 8)
        default = _core.default_tuning()
        for rows, small_batch, each in (
            (32, 1, ODD),
            (128, 5, Prefetch(0, 0, False)),
            (256, 16, Prefetch(64, 100, True)),
        ):
            _core.set_tuning(
                model.engine.model,
                _core.Tuning(
                    {name: (each,) * len(_core.BATCH_CLASSES) for name in default.prefetch},
                    dict.fromkeys(default.max_small_batch, small_batch),
                    rows,
                    tasks_per_thread=1 + small_batch,
                    spins=0,
                ),
            )
            for n in (1, 3, 5, 40):
                logits = model.logits((TOKENS * 8)[:n])
                np.testing.assert_array_equal(logits.view(np.int32), expected[:n].view(np.int32))


@needs_packing
def test_tune_is_cancelled_and_refused_after_close(files: dict[str, Path]) -> None:
    with load(files["Q4_K"]) as model:
        flag = _core.CancelFlag()
        flag.set()
        with pytest.raises(phi_c.errors.Cancelled):
            _core.tune(model.engine.model, 60.0, cancel=flag)
        assert _core.tune(model.engine.model, 60.0, _core.default_tuning().prefetch) == (settings(model), [])
    with pytest.raises(phi_c.errors.ModelClosedError):
        _core.tune(model.engine.model, 0.1)
    with pytest.raises(phi_c.errors.ModelClosedError):
        _core.set_tuning(model.engine.model, _core.default_tuning())
