"""Token ids and rendered chats of converted files against transformers' tokenizer."""

import pytest
from converted_model import Convert

from phi_c import llm
from phi_c.convert.vocabulary import PROBES
from reference_models import reference_tokenizer
from small_tokenizers import TOKENIZERS

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the harbour?\n"},
    {"role": "assistant", "content": "  Down the hill."},
    {"role": "user", "content": "Thanks, it's 10:30."},
]
CASES = {
    kind: ("Llama" if kind in ("smollm2", "llama-3") else "Phi3", kind, {"original_max_position_embeddings": 256})
    for kind in TOKENIZERS
}
CASES["smollm2"] = ("Llama", "smollm2", {})
CASES["llama-3"] = ("Llama", "llama-3", {})


@pytest.mark.parametrize("kind", CASES)
def test_ids_and_rendered_chat(converted: Convert, kind: str) -> None:
    model = converted(*CASES[kind])
    theirs = reference_tokenizer(model.folder)
    with llm.load(model.gguf) as engine:
        tokenizer = engine.tokenizer
        for text in PROBES:
            assert tokenizer.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False)
        if TOKENIZERS[kind][3] is None:
            return
        assert engine.template is not None
        text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert engine.template.render(MESSAGES) == text
        ids = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, parse_special=True, add_bos=False) == ids
