"""Paired tests against scipy on made-up scores."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from glora_llm.compare.significance import RowScores, corrected, over_rows, over_seeds, row_scores


def right(share: float, rows: int, seed: int) -> RowScores:
    drawn = np.random.default_rng(seed).random(rows) < share
    return RowScores("rows", drawn.astype(float), np.ones(rows))


def test_rows_that_are_right_or_wrong_are_tested_exactly() -> None:
    a, b = right(0.8, 200, 1), right(0.65, 200, 2)
    only_a, only_b = int(((a.values == 1) & (b.values == 0)).sum()), int(((a.values == 0) & (b.values == 1)).sum())
    found = over_rows([a], [b])
    assert found is not None and found.p_value == stats.binomtest(only_a, only_a + only_b).pvalue < 0.05
    assert found.name == f"exact McNemar over 200 test rows, {only_a + only_b} of them differ"
    same = over_rows([a], [a])
    assert same is not None and same.p_value == 1


def test_losses_are_tested_by_sign_flips() -> None:
    """Of many rows the permutation test is near to the t-test; of five, all 32 signs are tried."""
    draw = np.random.default_rng(0)
    loss, more = draw.normal(2, 1, 500), draw.normal(0.02, 0.2, 500)
    a, b = RowScores("rows", loss, np.ones(500)), RowScores("rows", loss + more, np.ones(500))
    found = over_rows([a], [b])
    assert found is not None and found.p_value == pytest.approx(stats.ttest_1samp(more, 0).pvalue, abs=0.015)
    five = RowScores("rows", np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.ones(5))
    exact = over_rows([five], [RowScores("rows", np.zeros(5), np.ones(5))])
    assert exact is not None and exact.p_value == 2 / 32


def test_rows_that_several_seeds_score_count_once() -> None:
    a, b = right(0.8, 100, 1), right(0.7, 100, 2)
    thrice = over_rows([a, a, a], [b, b, b])
    assert thrice is not None and thrice.name == "sign-flip permutation over 100 test rows"
    other_rows = [RowScores("other", one.values, one.weights) for one in (a, b)]
    both = over_rows([a, other_rows[0]], [b, other_rows[1]])
    assert both is not None and "over 200 test rows" in both.name
    assert both.p_value is not None and thrice.p_value is not None and both.p_value < thrice.p_value
    assert over_rows([a], [other_rows[1]]) is None, "not of the same rows"


def test_seeds_are_tested_by_students_paired_test() -> None:
    a, b = [0.61, 0.64, 0.60], [0.55, 0.60, 0.52]
    assert over_seeds(a, b).p_value == stats.ttest_rel(a, b).pvalue
    assert over_seeds([0.6], [0.5]).p_value is None
    assert over_seeds([0.5, 0.6], [0.5, 0.6]).p_value == 1


@pytest.mark.parametrize(
    ("name", "score", "value"),
    [
        ("exact_match", 0.5, [1, 0, 0, 1]),
        ("label_accuracy", 0.5, [0, 1, 1, 0]),
        ("accuracy_norm", 0.5, [0, 0, 1, 1]),
        ("accuracy", 0.5, [0, 1, 1, 0]),
        ("loss", 2.0, [2, 3, 1, 10]),
    ],
)
def test_rows_are_those_that_add_up_to_the_score(name: str, score: float, value: list[float], tmp_path: Path) -> None:
    """Several scores are 0.5 here: the name decides, and the value is checked."""
    table = [[2, 1, 1, 1, 0, 0, 1], [3, 1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 2, 2], [10, 5, 5, 1, 0, 3, 3]]
    (tmp_path / "test_rows.json").write_text(json.dumps({"rows": "digest", "scores": table}))
    found = row_scores(tmp_path, name, score)
    assert found is not None and found.values.tolist() == value
    assert found.is_binary == (name != "loss")
    assert row_scores(tmp_path, name, 0.123) is None and row_scores(tmp_path / "none", name, score) is None
    assert row_scores(tmp_path, "f1", score) is None


def test_p_values_are_corrected_for_their_number() -> None:
    assert corrected([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09]), "as R's p.adjust"
    assert corrected([0.5, 0.001]) == pytest.approx([0.5, 0.002]) and corrected([0.9, 0.8]) == [1.0, 1.0]
    assert corrected([]) == []
