"""Files of our converter in llama.cpp: they load, texts become the same ids, and greedy text is the same."""

from pathlib import Path
from typing import Any

import pytest
from converted_model import Convert
from llama_cpp import LlamaCpp, distance

from phi_c import llm
from phi_c.bench.random_model import random_model
from phi_c.bench.shapes import SHAPES, Shape

PROMPT = "The harbour was calm, and in 2024 the ships"
N_TOKENS = 24
SEED = 2  # llama.cpp gives no probabilities where the likeliest token is part of a character: not so with this one

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi3, SentencePiece": ("Phi3", "phi-3", {"original_max_position_embeddings": 256, "sliding_window": 200}),
    "phi3, byte-level BPE": ("Phi3", "phi-4", {"original_max_position_embeddings": 256}),
    "phi3, tied, partial, o200k": (
        "Phi3",
        "phi-4-mini",
        {"original_max_position_embeddings": 256, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    ),
    "llama": ("Llama", "smollm2", {}),
    "llama 3": (
        "Llama",
        "llama-3",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}


@pytest.mark.parametrize("outtype", ["f32", "f16"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_text(converted: Convert, case: str, outtype: str) -> None:
    model = converted(*CASES[case], outtype=outtype, seed=SEED, n_unused=0)
    theirs = LlamaCpp(model.gguf, 256)
    with llm.load(model.gguf) as engine:
        ids = engine.tokenizer.encode(PROMPT)
        logits = engine.logits(ids)[-1]
        # Prompts as text: ids that differ would show here.
        error = distance(theirs.log_probs(PROMPT, len(logits)), logits)
        print(f"NMSE {error:.1e}")
        assert error <= 1e-5
        endless = dict.fromkeys(engine.tokenizer.eog_ids, float("-inf"))  # as llama.cpp's ignore_eos
        mine = engine.generate(
            PROMPT, raw=True, max_tokens=N_TOKENS, temperature=0, repeat_penalty=1.0, logit_bias=endless
        )
    assert theirs.greedy(PROMPT, N_TOKENS) == mine.text
    if "tied" not in case:  # a random embedding that is the output too likes to repeat a token
        assert len(set(mine.tokens)) > 5


def test_it_loads_random_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a model that is called phi-3, which has llama.cpp look for tokens by name: benchmarks share the file."""
    shape = Shape("phi-3-tiny", 8, 512, 768, 4, 2, 128, 300, 4096, 4096)
    monkeypatch.setitem(SHAPES, shape.name, shape)
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path))
    path = random_model(shape.name)
    prompt = [1, 40, 41, 42]
    theirs = LlamaCpp(path, 256).log_probs(prompt, shape.n_vocab)
    with llm.load(path) as engine:
        assert distance(theirs, engine.logits(prompt)[-1]) <= 2e-3
