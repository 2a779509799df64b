"""A model file that the tests of prefix cache and saved states share."""

from pathlib import Path

import pytest

from tiny_gguf import write_tiny


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model file; tests do not change it."""
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0", n_ctx=2048)
