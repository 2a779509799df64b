"""Opens and loads a model file and runs one token: what tests with corrupt files call."""

from pathlib import Path

import numpy as np

from phi_c import _core
from phi_c.errors import PhiError
from phi_c.gguf.reader import GGUFFile
from phi_c.model.config import read_config
from phi_c.model.weights import load_weights


def run_one_token(path: Path) -> str:
    """Open, load and run a file; return "ran", or the name of the PhiError that was raised.

    Asserts that the error message is one line and names the file.
    """
    ids = np.zeros(1, np.int32)
    try:
        with GGUFFile(path) as file:
            config = read_config(file)
            model = _core.Model(config, load_weights(file, config), n_threads=1)
            try:
                kv = _core.KvCache(model, 1)
                logits = _core.forward(model, kv, ids, ids, ids, [ids], [False], ids)
            finally:
                model.close()
    except PhiError as error:
        assert "\n" not in str(error), f"the message has more than one line: {error!r}"
        assert str(path) in str(error), f"the message does not name the file: {error!r}"
        return type(error).__name__
    assert logits.shape == (1, config.n_vocab)
    return "ran"
