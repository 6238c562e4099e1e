import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moekit.data.packing import OPEN_ROWS, WINDOW, Packer, propose_lengths
from moekit.data.text import Corpus, Document
from moekit.data.tokenizer import ByteTokenizer

LIMITS = (64, 16)
SIZES = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 16)), max_size=600)


def packed(sizes, limits=LIMITS):
    """Rows of example numbers; those still open come last."""
    packer, rows = Packer(limits), []
    for start in range(0, len(sizes), WINDOW):
        packer.add_window([(s, start + i) for i, s in enumerate(sizes[start : start + WINDOW])])
        while row := packer.pack():
            rows.append(row)
    return rows, [packer.close(i) for i in range(OPEN_ROWS) if packer.rows[i]]


@settings(max_examples=50, deadline=None)
@given(SIZES)
def test_every_example_lies_in_one_row_and_fits(sizes):
    closed, rest = packed(sizes)
    assert sorted(i for row in closed + rest for i in row) == list(range(len(sizes)))
    for row in closed + rest:
        assert (np.sum([sizes[i] for i in row], 0) <= LIMITS).all()
    assert len(rest) <= OPEN_ROWS


@pytest.mark.parametrize(("mean", "full"), [((110, 10), 0.98), ((160, 10), 0.95)])
def test_rows_are_full_on_the_side_that_binds(mean, full):
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.exponential(mean, (6000, 2)).astype(int) + 1, 1, (512, 128)).tolist()
    closed, _ = packed(list(map(tuple, sizes)), (512, 128))
    inputs, targets = np.mean([np.sum([sizes[i] for i in row], 0) for row in closed], 0)
    assert inputs / 512 > full and targets / 128 < inputs / 512


def test_too_long():
    with pytest.raises(ValueError, match=r"\(3, 17\) tokens do not fit a row"):
        Packer(LIMITS).add_window([((3, 17), "x")])


def test_proposed_lengths_fill_both_sides():
    corpus = Corpus("long", lambda split: [Document("word " * 4000, str(i)) for i in range(4)])
    found = propose_lengths(corpus, ByteTokenizer(), examples=200)
    assert found.input_length == 512 and abs(found.target_length - 114) < 16
    assert min(found.input_fill, found.target_fill) > 0.86
    assert f"{found.input_fill:.1%}" in str(found)
