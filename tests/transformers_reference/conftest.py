"""Small random models, saved by transformers and converted by phi-c, cached for the test session."""

from pathlib import Path
from typing import Any

import pytest
from converted_model import Convert, Converted


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Ignore the tests without torch and transformers, which they import; `test_needed.py` reports the reason."""
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
    """Return a function (family, tokenizer, config, **options) -> Converted; equal arguments give the same model.

    config: changes to SMALL_CONFIG. outtype: as in `convert`. n_unused: rows of the embedding without a token. options:
    as in `save_model`.
    """
    from phi_c.convert.run import convert
    from reference_models import save_model
    from small_tokenizers import save_tokenizer

    cache: dict[str, Converted] = {}

    def get(
        family: str, tokenizer: str, config: dict[str, Any], *, outtype: str = "auto", n_unused: int = 5, **options: Any
    ) -> Converted:
        key = repr((family, tokenizer, config, outtype, n_unused, options))
        if key not in cache:
            folder = tmp_path_factory.mktemp("model") / "tiny"
            n_tokens = save_tokenizer(folder, tokenizer)
            ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
            save_model(folder, family, {"vocab_size": n_tokens + n_unused, **ids, **SMALL_CONFIG, **config}, **options)
            cache[key] = Converted(folder, convert(folder, folder.parent / "tiny.gguf", outtype=outtype), n_tokens)
        return cache[key]

    return get


SMALL_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
