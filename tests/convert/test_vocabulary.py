"""Conversion of tokenizer.json and tokenizer.model to GGUF metadata: the same ids, or an error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from phi_c.convert.vocabulary import PROBES, read_tokenizer
from phi_c.errors import ModelFileError, UnsupportedModelError
from phi_c.text.tokenizer import Tokenizer, load_tokenizer
from small_tokenizers import TOKENIZERS, save_tokenizer

TEXTS = (
    *PROBES,
    (Path(__file__).parents[1] / "english.txt").read_text(encoding="utf-8"),
    "",
    " ",
    "\n",
    "a\u0000b",
    "x" * 50,
    "the harbour wasn't   calm\t\t\n\n\n at 10,000 m",
)
PRE_NAMES = {
    "phi-3": "default",
    "phi-4": "dbrx",
    "phi-4-mini": "gpt-4o",
    "phi-2": "phi-2",
    "smollm2": "smollm",
    "llama-3": "llama-bpe",
}


def load(folder: Path, architecture: str = "phi3", n_vocab: int = 1000) -> tuple[Tokenizer, dict[str, Any]]:
    """Return phi-c's tokenizer for a folder and its metadata; numeric lists become arrays, as in a GGUF file."""
    metadata = read_tokenizer(folder, architecture, n_vocab)
    arrays = {k: np.array(v) for k, v in metadata.items() if isinstance(v, list) and not isinstance(v[0], str)}
    return load_tokenizer(metadata | arrays), metadata


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_equal_the_tokenizers_package(tmp_path: Path, kind: str) -> None:
    save_tokenizer(tmp_path, kind)
    ours, metadata = load(tmp_path, "phi2" if kind == "phi-2" else "phi3")
    assert metadata["tokenizer.ggml.pre"] == PRE_NAMES[kind]
    theirs = Backend.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False).ids, text
    special = TOKENIZERS[kind][1]
    text = f"Hi{special[-1]}\n {special[0]} there{special[-1]}"
    assert ours.encode(text, add_bos=False, parse_special=True) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_ids_and_template(tmp_path: Path, kind: str) -> None:
    save_tokenizer(tmp_path, kind)
    ours, metadata = load(tmp_path)
    bos, eos = TOKENIZERS[kind][2]
    assert ours.eos_id is not None
    assert ours.bos_id is not None
    assert (ours.token(ours.bos_id), ours.token(ours.eos_id)) == (bos, eos)
    assert ours.add_bos == (kind == "phi-3")
    assert metadata.get("tokenizer.chat_template") == TOKENIZERS[kind][3]


def test_template_in_chat_template_jinja(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "phi-2")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert load(tmp_path)[1]["tokenizer.chat_template"] == "{{ messages }}"


def test_phi3_vocabulary_round_trip(phi3_vocab: Path, tmp_path: Path) -> None:
    """The published vocabulary, written as tokenizer.json and converted, keeps the rank and type of every token."""
    from phi_c.gguf.reader import GGUFFile
    from phi_c.text.backend import build_backend
    from phi_c.text.vocabulary import read_vocabulary

    source = read_vocabulary(GGUFFile(phi3_vocab).metadata)
    content = json.loads(build_backend(source).to_str())
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if source.kinds[i] != 2}
    content["added_tokens"] = [
        {"id": i, "content": source.tokens[i], "special": source.kinds[i] == 3, "single_word": False}
        | {"lstrip": False, "rstrip": i in source.rstrip, "normalized": False}
        for i in range(len(source.tokens))
        if source.kinds[i] in (3, 4)
    ]
    content["model"]["unk_token"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|endoftext|>"}))
    ours, metadata = load(tmp_path, n_vocab=32064)
    assert ours.vocabulary.tokens == source.tokens
    for a, b in zip(ours.vocabulary.kinds, source.kinds, strict=True):
        assert a == b or {a, b} == {2, 5}  # unknown and unused tokens: tokenizer.json does not distinguish them
    assert ours.vocabulary.rstrip == source.rstrip
    ranked = [i for i, kind in enumerate(source.kinds) if kind == 1 and len(source.tokens[i]) > 1]
    by_score = sorted(ranked, key=lambda i: -metadata["tokenizer.ggml.scores"][i])
    assert by_score == sorted(ranked, key=lambda i: -source.scores[i])
    reference = load_tokenizer(GGUFFile(phi3_vocab).metadata)
    for text in TEXTS:
        assert ours.encode(text, add_bos=False) == reference.encode(text, add_bos=False)


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "normalizer": ({"normalizer": {"type": "NFC"}}, UnsupportedModelError, "no normalizer"),
    "no pre-tokenizer": ({"pre_tokenizer": None}, UnsupportedModelError, "with a pre-tokenizer"),
    "unknown pre-tokenizer": (
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        UnsupportedModelError,
        "unknown pre-tokenizer",
    ),
    "not BPE": (
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
        UnsupportedModelError,
        "expected a BPE vocabulary",
    ),
    "corrupt model": ({"model": 5}, UnsupportedModelError, "expected a BPE vocabulary"),
    "corrupt added tokens": ({"added_tokens": [{"id": 1}]}, ModelFileError, "missing field"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tokenizer_that_gguf_cannot_represent(tmp_path: Path, case: str) -> None:
    changes, error, message = REFUSED[case]
    save_tokenizer(tmp_path, "phi-4")
    edit_tokenizer(tmp_path, **changes)
    with pytest.raises(error, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_merges_that_scores_cannot_represent(tmp_path: Path) -> None:
    """SentencePiece ranks tokens, so it reaches every token; without most merges, this BPE does not."""
    save_tokenizer(tmp_path, "phi-3")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:10]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="gets different ids"):
        load(tmp_path)


def test_id_beyond_the_embedding(tmp_path: Path) -> None:
    n_tokens = save_tokenizer(tmp_path, "phi-4")
    load(tmp_path, n_vocab=n_tokens)
    with pytest.raises(ModelFileError, match=f"expected 0 to {n_tokens - 2}"):
        load(tmp_path, n_vocab=n_tokens - 1)


def test_sentencepiece(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: the extra `reference`")
    library.SentencePieceTrainer.train(
        input=str(Path(__file__).parents[1] / "english.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": {}})
    )
    ours, metadata = load(tmp_path, n_vocab=510)
    processor = library.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    for text in ("Hello world, it's 2024.", "the harbour wasn't calm", "\u00fcber \u4f60\u597d"):
        assert ours.encode(text, add_bos=False) == processor.encode(text)
