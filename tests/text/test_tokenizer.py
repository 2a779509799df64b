"""The tokenizer: SentencePiece's merge rule, special tokens, BOS, corrupt vocabularies."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spm_oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from phi_c.errors import ModelFileError, OptionError, UnsupportedModelError
from phi_c.gguf.reader import GGUFFile
from phi_c.text.backend import build_backend
from phi_c.text.tokenizer import Tokenizer, load_tokenizer
from tiny_gguf import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_tiny(tmp_path_factory.mktemp("tiny") / "m.gguf", weight_type="F16")
    return load_tokenizer(GGUFFile(path).metadata)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_tiny(tmp_path_factory.mktemp("tiny") / "m.gguf", weight_type="F16", vocabulary="bpe")
    return load_tokenizer(GGUFFile(path).metadata)


@pytest.fixture(scope="module")
def phi3(phi3_vocab: Path) -> Tokenizer:
    return load_tokenizer(GGUFFile(phi3_vocab).metadata)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=60) | st.text("the and\n\t <|>s▁é漢🙂in", max_size=80)


@settings(max_examples=300)
@given(text=TEXTS)
def test_tiny_spm_equals_sentencepiece_rule(tiny: Tokenizer, text: str) -> None:
    assert tiny.encode(text, add_bos=False) == spm_oracle.encode(tiny.vocabulary, text)


ADVERSARIAL = [
    "Hello, world",
    "  leading and   many    spaces     ",
    "\n\n\ttabs\tand\r\nlines\n",
    "a" * 50 + "aaaa aaa aa",
    "ünïcödé Ελληνικά русский 漢字 かな 한국어 العربية עברית हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "x = [i ** 2 for i in range(10)]  # code",
    "1234567890 3.14159 1,000,000",
    "</s><s><|end|>",
    "▁▁▁ ▁",
    "\x00\x01\x7f",
    "=" * 33 + "-" * 17,
]


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_phi3_equals_sentencepiece_rule(phi3: Tokenizer, text: str) -> None:
    assert phi3.encode(text, add_bos=False) == spm_oracle.encode(phi3.vocabulary, text)


@settings(max_examples=60)
@given(text=TEXTS)
def test_phi3_equals_sentencepiece_rule_on_random_text(phi3: Tokenizer, text: str) -> None:
    assert phi3.encode(text, add_bos=False) == spm_oracle.encode(phi3.vocabulary, text)


@settings(max_examples=200)
@given(text=TEXTS)
def test_round_trip(tiny: Tokenizer, bpe: Tokenizer, text: str) -> None:
    # SentencePiece replaces spaces with U+2581 and cannot distinguish the two.
    assert tiny.decode(tiny.encode(text)) == text.replace("\u2581", " ")
    assert bpe.decode(bpe.encode(text)) == text


def test_building_phi3_takes_linear_time(phi3: Tokenizer) -> None:
    """Four times the tokens take about four times the CPU time; quadratic code would take 16 times."""
    whole = phi3.vocabulary
    n = len(whole.tokens) // 4
    quarter = replace(whole, tokens=whole.tokens[:n], kinds=whole.kinds[:n], scores=whole.scores[:n])
    seconds: dict[int, list[float]] = {n: [], len(whole.tokens): []}
    for _ in range(3):
        for vocabulary in (quarter, whole):
            start = time.process_time()
            build_backend(vocabulary)
            seconds[len(vocabulary.tokens)].append(time.process_time() - start)
    assert min(seconds[len(whole.tokens)]) < 10 * min(seconds[n])


def test_special_tokens_are_plain_text_by_default(phi3: Tokenizer) -> None:
    text = "<|user|>Hi<|end|></s>"
    assert phi3.encode(text, parse_special=True) == [1, 32010, 6324, 32007, 2]
    plain = phi3.encode(text)
    assert not any(phi3.is_special(i) for i in plain[1:])
    assert phi3.decode(plain) == text


def test_white_space_after_special_tokens(phi3: Tokenizer) -> None:
    """Ids 32001 to 32010 and </s> absorb it; <s> and <|endoftext|> do not (Phi-3's tokenizer.json)."""
    assert phi3.encode("<|assistant|>\n", parse_special=True) == [1, 32001]
    assert phi3.encode("<|end|>\n<|user|> \n Hi", parse_special=True) == [1, 32007, 32010, 6324]
    assert phi3.encode("</s> \nHi", parse_special=True) == [1, 2, 6324]
    assert phi3.encode("<|endoftext|>\n", parse_special=True) == [1, 32000, 29871, 13]
    assert phi3.encode("Hi\n<|end|>", parse_special=True) == [1, 6324, 13, 32007]


def test_exactly_one_bos(phi3: Tokenizer) -> None:
    assert phi3.encode("<s>Hi", parse_special=True) == [1, 6324]
    assert phi3.encode("Hi") == [1, 6324]
    assert phi3.encode("Hi", add_bos=False) == [6324]
    assert phi3.encode("") == [1]


def test_end_of_generation(phi3: Tokenizer, bpe: Tokenizer) -> None:
    assert phi3.eog_ids == {2, 32000, 32007}
    assert {bpe.token(i) for i in bpe.eog_ids} == {"<|endoftext|>", "<|im_end|>"}


def test_smollm2_ids(smollm2_path: Path) -> None:
    """Tokens of the published tokenizer: single digits, and spaces are part of the following word."""
    with GGUFFile(smollm2_path) as file:
        tokenizer = load_tokenizer(file.metadata)
    ids = tokenizer.encode("Hello world 123\n  x")
    assert [tokenizer.token(i) for i in ids] == ["Hello", "Ġworld", "Ġ", "1", "2", "3", "ĊĠ", "Ġx"]
    assert tokenizer.add_bos is False


def test_lone_surrogates_become_question_marks(tiny: Tokenizer) -> None:
    assert tiny.decode(tiny.encode("a\ud800b")) == "a?b"


def test_pieces_are_bytes(phi3: Tokenizer) -> None:
    ids = phi3.encode("🙂", add_bos=False)
    assert b"".join(map(phi3.piece, ids)) == " 🙂".encode()
    assert phi3.piece(32007) == b""
    assert phi3.piece(32007, special=True) == b"<|end|>"
    with pytest.raises(OptionError, match="token id 32064 is outside the vocabulary"):
        phi3.piece(32064)


def metadata(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<|end|>"],
        "tokenizer.ggml.token_type": np.asarray([1, 1, 1, 3]),
        "tokenizer.ggml.merges": ["a b"],
    }
    return base | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "gpt-4o"])
def test_every_pre_tokenizer(pre: str) -> None:
    assert load_tokenizer(metadata(pre=pre)).encode("abba") == [2, 1, 0]


CORRUPT = {
    "merges: entry 0 is 'ab'": {"merges": ["ab"]},
    "are not in the vocabulary": {"merges": ["a c"]},
    "token_type has 1 entries, expected 4": {"token_type": np.asarray([1])},
    "token_type contains an infinite value": {"token_type": np.asarray([1, 1, 1, np.inf])},
    "bos_token_id is 4, expected a token id from 0 to 3": {"bos_token_id": 4},
    "eos_token_id is a ndarray, expected a token id from 0 to 3": {"eos_token_id": np.zeros(9, np.float32)},
    "add_bos_token is a int, expected a bool": {"add_bos_token": 1},
    "tokens is a str, expected an array of strings": {"tokens": "ab"},
    "tokens is empty": {"tokens": []},
}


@pytest.mark.parametrize("message", CORRUPT)
def test_corrupt_vocabulary(message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        load_tokenizer(metadata(**CORRUPT[message]))


def test_unsupported_kinds_of_tokenizer() -> None:
    with pytest.raises(UnsupportedModelError, match="tokenizer.ggml.pre is 'qwen2', expected one of default, gpt-2"):
        load_tokenizer(metadata(pre="qwen2"))
    with pytest.raises(UnsupportedModelError, match="tokenizer.ggml.model is 'bert'"):
        load_tokenizer(metadata(model="bert"))


def tokenizer_json(tokenizer: Tokenizer, path: Path, **changes: Any) -> Path:
    """Write the pipeline as a tokenizer.json with its special tokens, like those published on the hub."""
    content = json.loads(tokenizer._backend.to_str())
    content["added_tokens"] = [
        {"id": i, "content": tokenizer.token(i), "single_word": False, "lstrip": False, "normalized": False}
        | {"rstrip": tokenizer.token(i) != "<s>", "special": True}
        for i in sorted(tokenizer.vocabulary.special)
    ]
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


def test_tokenizer_json_gives_the_same_ids(tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf")) as file:
        own = load_tokenizer(file.metadata)
        other = load_tokenizer(file.metadata, tokenizer_json(own, tmp_path / "tokenizer.json"))
    for text in (*ADVERSARIAL, "<s><|user|>\nthe and<|end|>\n<|assistant|>\n"):
        for parse_special in (False, True):
            expected = own.encode(text, parse_special=parse_special)
            assert other.encode(text, parse_special=parse_special) == expected


def test_tokenizer_json_of_another_model(tmp_path: Path, bpe: Tokenizer) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf")) as file:
        wrong = tokenizer_json(bpe, tmp_path / "tokenizer.json")
        with pytest.raises(ModelFileError, match="belongs to another model"):
            load_tokenizer(file.metadata, wrong)
        wrong.write_text("{}", encoding="utf-8")
        with pytest.raises(ModelFileError, match="is not a usable tokenizer.json"):
            load_tokenizer(file.metadata, wrong)
