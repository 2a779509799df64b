"""Grids of parameters: a few values run with plain `pytest`, the rest with `pytest -m exhaustive`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_exhaustive(values: Iterable[Any], keep: Collection[Any]) -> list[Any]:
    """Return the values for pytest.mark.parametrize, those not in `keep` marked exhaustive."""
    return [value if value in keep else pytest.param(value, marks=pytest.mark.exhaustive) for value in values]
