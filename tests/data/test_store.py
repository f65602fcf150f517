"""Rows that judge a choice cannot be read while it is made."""

from pathlib import Path

import numpy as np
import pytest

from glora_llm.data.sample import Sample
from glora_llm.data.store import TokenSet, write_set


@pytest.fixture
def rows(tmp_path: Path) -> TokenSet:
    """Five rows of 4 to 8 tokens, the last two of each targets."""
    samples = []
    for number in range(5):
        tokens = np.arange(4 + number, dtype=np.int32)
        samples.append(Sample(tokens, tokens >= 2 + number))
    write_set(tmp_path / "test", samples, [[number] for number in range(5)])
    return TokenSet(tmp_path / "test", "test", "test")


def test_sealed_rows_cannot_be_read(rows: TokenSet) -> None:
    with rows.sealed("a search was choosing a genome"):
        for number in range(len(rows)):
            with pytest.raises(RuntimeError, match="the test rows were read while a search was choosing a genome"):
                rows.row(number)


def test_what_tells_nothing_of_the_rows_may_be_asked(rows: TokenSet) -> None:
    before = rows.digest()
    with rows.sealed("it was asked"):
        assert (len(rows), rows.lengths().tolist()) == (5, [4, 5, 6, 7, 8])
        assert rows.digest() == before


def test_rows_can_be_read_again_afterwards(rows: TokenSet) -> None:
    """And after an error in between, as of a search that fails."""
    with rows.sealed("first"):
        pass
    with pytest.raises(KeyError), rows.sealed("second"):
        raise KeyError
    assert rows.row(4).tokens.tolist() == list(range(8)) and rows.row(4).targets.sum() == 2
