"""Small models of transformers' classes, saved, converted by phi-c, and run by transformers; kept for the session."""

from pathlib import Path
from typing import Any

import pytest
from converted_model import Convert, Converted


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the tests out where their modules could not be imported; `test_needed.py` says why."""
    if collection_path.name == "test_needed.py" or collection_path.suffix != ".py":
        return None
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return True
    return None


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Return a function: (family, kind of tokenizer, changes to the configuration, **options) -> Converted."""
    from phi_c.convert.run import convert
    from reference_models import save_model
    from small_tokenizers import save_tokenizer

    made: dict[str, Converted] = {}

    def make(
        family: str, kind: str, config: dict[str, Any], *, outtype: str = "auto", n_unused: int = 5, **options: Any
    ) -> Converted:
        key = repr((family, kind, config, outtype, n_unused, options))
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / "tiny"
            n_tokens = save_tokenizer(folder, kind)
            ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
            save_model(folder, family, {"vocab_size": n_tokens + n_unused, **ids, **SMALL, **config}, **options)
            made[key] = Converted(folder, convert(folder, folder.parent / "tiny.gguf", outtype=outtype), n_tokens)
        return made[key]

    return make


SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
