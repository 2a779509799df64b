"""Reports the packages that the other files of this folder need."""

import pytest


def test_torch_and_transformers() -> None:
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[reference]' to run these tests")
