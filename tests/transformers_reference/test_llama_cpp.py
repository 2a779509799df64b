"""Converted files in llama.cpp: they load, prompts get the same ids, and greedy generation gives the same text."""

from pathlib import Path
from typing import Any

import pytest
from converted_model import Convert
from llama_cpp import LlamaCpp, log_prob_nmse

from phi_c import llm
from phi_c.bench.random_model import random_model
from phi_c.bench.shapes import SHAPES, Shape

PROMPT = "The harbour was calm, and in 2024 the ships"
N_TOKENS = 24
# llama.cpp returns no probabilities if the most probable token is part of a character. With this seed none is.
SEED = 2

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi3, SentencePiece": ("Phi3", "phi-3", {"original_max_position_embeddings": 256, "sliding_window": 200}),
    "phi3, byte-level BPE": ("Phi3", "phi-4", {"original_max_position_embeddings": 256}),
    "phi3, tied embedding, partial rotary, o200k": (
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
def test_same_logits_and_greedy_text(converted: Convert, case: str, outtype: str) -> None:
    model = converted(*CASES[case], outtype=outtype, seed=SEED, n_unused=0)
    theirs = LlamaCpp(model.gguf, 256)
    with llm.load(model.gguf) as engine:
        ids = engine.tokenizer.encode(PROMPT)
        logits = engine.logits(ids)[-1]
        # The prompt is text, so llama.cpp's own tokenizer must give the same ids.
        error = log_prob_nmse(theirs.log_probs(PROMPT, len(logits)), logits)
        print(f"NMSE {error:.1e}")
        assert error <= 1e-5
        ban_eog = dict.fromkeys(engine.tokenizer.eog_ids, float("-inf"))  # as llama.cpp's ignore_eos
        ours = engine.generate(
            PROMPT, raw=True, max_tokens=N_TOKENS, temperature=0, repeat_penalty=1.0, logit_bias=ban_eog
        )
    assert theirs.greedy(PROMPT, N_TOKENS) == ours.text
    if "tied" not in case:  # a tied random embedding tends to repeat a token
        assert len(set(ours.tokens)) > 5


def test_random_weights_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The benchmarks' random-weight file loads: for names with phi-3, llama.cpp looks up special tokens by text."""
    shape = Shape("phi-3-tiny", 8, 512, 768, 4, 2, 128, 300, 4096, 4096)
    monkeypatch.setitem(SHAPES, shape.name, shape)
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path))
    path = random_model(shape.name)
    prompt = [1, 40, 41, 42]
    theirs = LlamaCpp(path, 256).log_probs(prompt, shape.n_vocab)
    with llm.load(path) as engine:
        assert log_prob_nmse(theirs, engine.logits(prompt)[-1]) <= 2e-3
