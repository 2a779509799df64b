"""Streaming: whole characters, stop strings across tokens, the same text as decoding at once."""

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


def pushed(stream: StreamDecoder, ids: list[int]) -> list[str]:
    return [*(stream.push(i) for i in ids), stream.finish()]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 390), max_size=40))
def test_pieces_are_the_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Any ids, so any broken UTF-8."""
    assert "".join(pushed(StreamDecoder(tokenizer), ids)) == tokenizer.decode(ids)


def test_never_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂é", add_bos=False)
    pieces = pushed(StreamDecoder(tokenizer), ids)
    assert "\ufffd" not in "".join(pieces)
    assert [p for p in pieces if p] == ["a", "🙂", "é"]


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂", add_bos=False)[:-1]
    assert pushed(StreamDecoder(tokenizer), ids)[-1] == "\ufffd"


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab the", max_size=30), stops=st.lists(st.text("ab te", min_size=1, max_size=4), max_size=3))
def test_stop_strings_across_tokens(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    stream = StreamDecoder(tokenizer, stops)
    given_out = "".join(pushed(stream, tokenizer.encode(text, add_bos=False)))
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped is bool(ends)
    if not ends:
        assert given_out == text
    else:
        # The first stop string to be complete ends the text: another may have begun before it.
        assert text.startswith(given_out)
        assert len(given_out) in [text.find(stop) for stop in stops]
        assert not any(stop in given_out for stop in stops)
    assert stream.text == given_out


def test_text_is_held_back_only_while_it_may_become_a_stop(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer, ["END"])
    assert [stream.push(i) for i in tokenizer.encode("xEx", add_bos=False)] == ["", "x", "", "Ex"]


def test_a_first_space_belongs_to_a_text_that_continues(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the", add_bos=False)
    assert "".join(pushed(StreamDecoder(tokenizer), ids)) == "the"
    assert "".join(pushed(StreamDecoder(tokenizer, continues=True), ids)) == " the"


def test_special_tokens_are_nothing_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|end|>", add_bos=False, parse_special=True)
    assert "".join(pushed(StreamDecoder(tokenizer), ids)) == "a"
    assert "".join(pushed(StreamDecoder(tokenizer, special=True), ids)) == "a<|end|>"
