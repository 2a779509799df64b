"""StreamDecoder: complete characters, stop strings that span tokens, the same text as `decode`."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi_c.gguf.reader import GGUFFile
from phi_c.text.stream_decoder import StreamDecoder
from phi_c.text.tokenizer import Tokenizer, load_tokenizer
from tiny_gguf import write_tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_tiny(tmp_path_factory.mktemp("tiny") / "m.gguf", weight_type="F16")
    return load_tokenizer(GGUFFile(path).metadata)


def push_all(stream: StreamDecoder, ids: list[int]) -> list[str]:
    return [*(stream.push(i) for i in ids), stream.finish()]


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 390), max_size=40))
def test_streamed_text_equals_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    """For arbitrary ids, which include invalid UTF-8."""
    assert "".join(push_all(StreamDecoder(tokenizer), ids)) == tokenizer.decode(ids)


def test_characters_are_never_split(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂é", add_bos=False)
    pieces = push_all(StreamDecoder(tokenizer), ids)
    assert "\ufffd" not in "".join(pieces)
    assert [p for p in pieces if p] == ["a", "🙂", "é"]


def test_incomplete_character_at_the_end_is_replaced(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂", add_bos=False)[:-1]
    assert push_all(StreamDecoder(tokenizer), ids)[-1] == "\ufffd"


@settings(max_examples=300)
@given(text=st.text("ab the", max_size=30), stops=st.lists(st.text("ab te", min_size=1, max_size=4), max_size=3))
def test_stop_strings_span_tokens(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    stream = StreamDecoder(tokenizer, stops)
    streamed = "".join(push_all(stream, tokenizer.encode(text, add_bos=False)))
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped is bool(ends)
    if not ends:
        assert streamed == text
    else:
        # The stop string that is completed first ends the text, even if another one began earlier.
        assert text.startswith(streamed)
        assert len(streamed) in [text.find(stop) for stop in stops]
        assert not any(stop in streamed for stop in stops)
    assert stream.text == streamed


def test_text_is_withheld_only_while_it_may_become_a_stop_string(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer, ["END"])
    assert [stream.push(i) for i in tokenizer.encode("xEx", add_bos=False)] == ["", "x", "", "Ex"]


def test_first_space_is_kept_in_a_continuation(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the", add_bos=False)
    assert "".join(push_all(StreamDecoder(tokenizer), ids)) == "the"
    assert "".join(push_all(StreamDecoder(tokenizer, continues=True), ids)) == " the"


def test_special_tokens_are_omitted_by_default(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|end|>", add_bos=False, parse_special=True)
    assert "".join(push_all(StreamDecoder(tokenizer), ids)) == "a"
    assert "".join(push_all(StreamDecoder(tokenizer, special=True), ids)) == "a<|end|>"
