"""Tier checks that depend on the machine, with simulated machines."""

import re

import pytest

from phi_c import _core, params
from phi_c.errors import OptionError

ALL = ["scalar", "avx2", "avx512", "amx", "amxbf16"]
FEATURES = ["avx2", "avx512bf16", "amx_tile", "amx_int8", "amx_bf16"]
REFUSED = ", which needs AMX tiles that the system denies this process"


@pytest.mark.parametrize(
    ("built", "available", "features", "reason"),
    [
        (ALL, ALL[:3], FEATURES, REFUSED),
        (ALL, ALL[:3], FEATURES[:2], ""),  # not supported by the CPU
        (ALL, ALL[:2], FEATURES, ""),  # no AVX-512, which the tier needs as well
        (ALL[:3], ALL[:3], FEATURES, ""),  # not in the build
    ],
)
@pytest.mark.parametrize("tier", ["amx", "amxbf16"])
def test_error_says_why_amx_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, tier: str, built: list[str], available: list[str], features: list[str], reason: str
) -> None:
    monkeypatch.setattr(params, "tiers", lambda *, known=False: built if known else available)
    monkeypatch.setattr(params, "cpu_features", lambda: features)
    expected = f"is {tier!r}{reason}, expected one that this machine runs: {', '.join(available)}"
    with pytest.raises(OptionError, match=f"^tier {re.escape(expected)}$"):
        params.choose_tier(tier)
    monkeypatch.setenv("PHI_C_ISA", tier)
    with pytest.raises(OptionError, match=f"^PHI_C_ISA {re.escape(expected)}$"):
        params.choose_tier(None)
    assert params.choose_tier("scalar") == "scalar"


def test_available_tiers_are_known_tiers_in_order() -> None:
    known = _core.tiers(known=True)
    assert [tier for tier in known if tier in _core.tiers()] == _core.tiers()
