"""Running text in full rows: every token is learnt once, and no room is left."""

from itertools import pairwise

import numpy as np
import pytest

from glora_llm.data.report import Report
from glora_llm.data.sample import Sample
from glora_llm.data.tokenize import fill_rows

BOS = 1


def samples(lengths: list[int]) -> list[Sample]:
    """Samples that begin with BOS; every other token is a number of its own."""
    made, first = [], 100
    for length in lengths:
        tokens = np.array([BOS, *range(first, first + length - 1)], dtype=np.int32)
        made.append(Sample(tokens, np.arange(length) > 0))
        first += length - 1
    return made


@pytest.mark.parametrize("most", [3, 4, 7, 16, 1000])
@pytest.mark.parametrize("bos", [BOS, None])
def test_rows_are_full_and_nothing_is_lost(most: int, bos: int | None) -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 60).tolist()
    given = samples(lengths)
    report = Report("train")
    pieces, rows = fill_rows(given, most, bos, report)
    learnt = [int(token) for piece in pieces for token in piece.tokens[piece.targets]]
    assert learnt == list(range(100, 100 + sum(lengths) - len(lengths))), "each once, in order"
    assert [number for row in rows for number in row] == list(range(len(pieces)))
    sizes = [sum(len(pieces[number].tokens) for number in row) for row in rows]
    assert len(rows) > 1 or most == 1000
    short = [size for size in sizes[:-1] if size != most]
    assert not short if most > 3 else set(short) <= {most - 1}
    assert 0 < sizes[-1] <= most and min(len(piece.tokens) for piece in pieces) >= 2
    assert report.longest == max(lengths) and report.split == sum(_is_cut(sample, pieces) for sample in given)


def _is_cut(sample: Sample, pieces: list[Sample]) -> bool:
    own = set(sample.tokens[1:].tolist())
    return sum(int(piece.tokens[-1]) in own for piece in pieces) > 1


def test_a_piece_begins_with_bos_or_with_the_token_before() -> None:
    for bos in (BOS, None):
        pieces, _ = fill_rows(samples([20]), 8, bos, Report("train"))
        assert len(pieces) == 3 and not any(piece.targets[0] for piece in pieces)
        for before, piece in pairwise(pieces):
            assert piece.tokens[0] == (BOS if bos else before.tokens[-1])


def test_no_room_of_one_token_is_left() -> None:
    """Seven tokens in a row of eight: the last one moves into a piece of its own."""
    pieces, rows = fill_rows(samples([7, 9]), 8, BOS, Report("train"))
    assert [len(piece.tokens) for piece in pieces] == [6, 2, 8, 2] and rows == [[0, 1], [2], [3]]
