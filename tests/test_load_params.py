"""Options whose check depends on the machine, on machines that are made up."""

import re

import pytest

from phi_c import _core, params
from phi_c.errors import OptionError

ALL = ["scalar", "avx2", "avx512", "amx", "amxbf16"]
FEATURES = ["avx2", "avx512bf16", "amx_tile", "amx_int8", "amx_bf16"]
REASON = ", for which the system refuses this process AMX tiles"


@pytest.mark.parametrize(
    ("built", "runs", "features", "reason"),
    [
        (ALL, ALL[:3], FEATURES, REASON),
        (ALL, ALL[:3], FEATURES[:2], ""),  # the CPU lacks it
        (ALL, ALL[:2], FEATURES, ""),  # it lacks AVX-512, which the tier is built upon
        (ALL[:3], ALL[:3], FEATURES, ""),  # the build does
    ],
)
@pytest.mark.parametrize("tier", ["amx", "amxbf16"])
def test_why_there_is_no_amx(
    monkeypatch: pytest.MonkeyPatch, tier: str, built: list[str], runs: list[str], features: list[str], reason: str
) -> None:
    monkeypatch.setattr(params, "tiers", lambda *, known=False: built if known else runs)
    monkeypatch.setattr(params, "cpu_features", lambda: features)
    expected = f"is {tier!r}{reason}, expected one that this machine runs: {', '.join(runs)}"
    with pytest.raises(OptionError, match=f"^tier {re.escape(expected)}$"):
        params.choose_tier(tier)
    monkeypatch.setenv("PHI_C_ISA", tier)
    with pytest.raises(OptionError, match=f"^PHI_C_ISA {re.escape(expected)}$"):
        params.choose_tier(None)
    assert params.choose_tier("scalar") == "scalar"


def test_known_tiers() -> None:
    known = _core.tiers(known=True)
    assert [tier for tier in known if tier in _core.tiers()] == _core.tiers()
