"""A small sparse model that all evaluation tests share."""

import pytest

import moekit as mk


@pytest.fixture(scope="session")
def model() -> mk.EncoderDecoder:
    # room for all tokens of an expert: outputs do not depend on the other rows of a batch
    cfg = mk.preset("st-nano").replace(d_model=16, d_ff=32, eval_capacity_factor=8.0)
    return mk.EncoderDecoder(cfg, seed=0)
