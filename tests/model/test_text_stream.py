"""Pieces of a growing text: together the text up to its stop text, each of whole characters."""

from hypothesis import given, strategies as st

import moekit as mk
from moekit.model.text_stream import REPLACEMENT, settled, text_pieces, until_stop

CHARACTERS = "ab\n\u00e9\u20ac\U0001f600"  # of one to four bytes
TOKENIZER = mk.ByteTokenizer()


def growing(data: bytes, chunk: int) -> list[str]:
    """The text of the first bytes, after every `chunk` of them."""
    ids = [byte + 3 for byte in data]
    ends = range(chunk, len(ids) + chunk, chunk)
    return [TOKENIZER.decode(ids[:end]) for end in ends]


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3)


@given(data=st.binary(max_size=40), chunk=st.integers(1, 9), stops=STOPS)
def test_pieces_of_any_bytes_join_to_the_answer(data, chunk, stops):
    pieces = list(text_pieces(growing(data, chunk), stops))
    assert "".join(pieces) == until_stop(data.decode(errors="replace"), stops)
    assert all(pieces)


@given(text=st.text(CHARACTERS, max_size=20), chunk=st.integers(1, 9), stops=STOPS)
def test_no_piece_has_a_broken_character(text, chunk, stops):
    pieces = list(text_pieces(growing(text.encode(), chunk), stops))
    assert REPLACEMENT not in "".join(pieces)
    assert "".join(pieces) == until_stop(text, stops)


@given(text=st.text("ab", max_size=12), stops=STOPS, later=st.text("ab", max_size=6))
def test_settled_text_does_not_change(text, stops, later):
    if until_stop(text, stops) == text:
        ready = settled(text, stops)
        assert until_stop(text + later, stops).startswith(ready)


def test_the_beginning_of_a_stop_text_is_held_back():
    texts = ["Paris", "Paris\n", "Paris\nQ", "Paris\nQ: x"]
    assert list(text_pieces(texts, ["\nQ:"])) == ["Paris"]
    assert list(text_pieces([*texts[:3], "Paris\nQu"], ["\nQ:"])) == ["Paris", "\nQu"]
    assert until_stop("a b c", ["c", "b"]) == "a "
    # a token at a time, "b" is complete before "aba" is
    assert until_stop("aba", ["aba", "b"]) == "a" and until_stop("ab", ["b", "ab"]) == ""


def test_wrong_bytes_do_not_hold_back_a_stream():
    assert settled(REPLACEMENT * 10, ()) == REPLACEMENT * 7
