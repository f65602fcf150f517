"""Is a method behind the best one, or level? Tests paired over test rows, or else over seeds.

Rows: of one seed and a score that is right or wrong, the exact binomial test of the rows on which the two differ
(McNemar); else a sign-flip permutation test of the differences. A row that several seeds score counts once, with its
mean difference. Seeds: Student's t-test of the paired differences. All by scipy, two-sided. The p-values of several
methods against the best are corrected for their number (Holm).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glora_llm.tasks.task import COLUMNS

LEVEL = 0.05  # above it two methods are level
RESAMPLES = 9999
CLOSE = 1e-6
CHOSEN = "chosen"  # not a column: what the model chose is what is right
ROWS_FILE = "test_rows.json"
# score -> what each row adds to it, as (value, weight): columns of `tasks.task.COLUMNS` whose sums it is the ratio of;
# weight None: each row counts 1. Where tasks differ, the first part whose ratio is the score is it: of options that is
# `among_labels`, the right option; of images that is top5_accuracy, equal to the accuracy only where no row differs.
PARTS: dict[str, tuple[tuple[str, str | None], ...]] = {
    "loss": (("loss", "targets"), ("loss", None)),
    "bits_per_byte": (("bits", "text_bytes"),),
    "token_accuracy": (("correct", "targets"),),
    "exact_match": (("all_correct", None),),
    "label_accuracy": (("among_labels", None),),
    "accuracy": (("among_labels", None), ("all_correct", None), (CHOSEN, None)),
    "accuracy_norm": ((CHOSEN, None),),
    "top5_accuracy": (("among_labels", None),),
}


@dataclass(frozen=True)
class RowScores:
    """The part of each test row in a score, which is sum(values) / sum(weights).

    Attributes:
        rows: digest of the rows: equal for equal rows in the same order.
        values, weights: (rows,).
    """

    rows: str
    values: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def is_binary(self) -> bool:
        """True where each row is right or wrong."""
        return bool(np.isin(self.values, (0, 1)).all() and (self.weights == 1).all())


@dataclass(frozen=True)
class PairedTest:
    """The outcome of a test.

    Attributes:
        p_value: None: nothing could be tested.
        name: of the test, for people.
    """

    p_value: float | None
    name: str


def row_scores(folder: Path, name: str, score: float | None) -> RowScores | None:
    """Return the parts of a test score that a run wrote row by row; None where they do not add up to the score.

    Args:
        name: of the score.
        score: the test score that the run reports.
    """
    file = folder / ROWS_FILE
    if score is None or not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    table = np.array(found["scores"], dtype=np.float64)
    columns: dict[str, NDArray[np.float64]] = dict(zip(COLUMNS, table.T, strict=False))  # older: fewer
    columns["bits"] = columns["loss"] / np.log(2)
    columns[CHOSEN] = (columns["predicted"] == columns["reference"]).astype(np.float64)
    for value, weight in PARTS.get(name, ()):
        weights = np.ones(len(table)) if weight is None else columns.get(weight, np.zeros(len(table)))
        if weights.sum() and abs(columns[value].sum() / weights.sum() - score) < CLOSE:
            return RowScores(found["rows"], columns[value], weights)
    return None


def over_rows(best: Sequence[RowScores], other: Sequence[RowScores]) -> PairedTest | None:
    """Test two methods paired over test rows, a RowScores for each seed; None where the rows differ between them."""
    pairs = list(zip(best, other, strict=True))
    if not pairs or any(a.rows != b.rows or a.values.shape != b.values.shape for a, b in pairs):
        return None
    differences = [(a.values - b.values) for a, b in pairs]
    same_rows = len({a.rows for a, _ in pairs}) == 1
    over = np.mean(differences, axis=0) if same_rows else np.concatenate(differences)
    if len(pairs) == 1 and best[0].is_binary and other[0].is_binary:
        return _exact(over)
    return PairedTest(_sign_flips(over), f"sign-flip permutation over {len(over):,} test rows")


def _exact(differences: NDArray[np.float64]) -> PairedTest:
    """McNemar's exact test: of the rows on which two methods differ, each is as often right as the other."""
    from scipy.stats import binomtest

    wins, count = int((differences > 0).sum()), int((differences != 0).sum())
    p_value = float(binomtest(wins, count).pvalue) if count else 1.0
    return PairedTest(p_value, f"exact McNemar over {len(differences):,} test rows, {count} of them differ")


def _sign_flips(differences: NDArray[np.float64]) -> float:
    """Two-sided: how often the mean is as far from 0 when each row's difference has a random sign."""
    from scipy.stats import permutation_test

    if not differences.any():
        return 1.0
    result = permutation_test(
        (differences,),
        lambda values, axis: np.mean(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // len(differences)),
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def corrected(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: the chance that any of them is so small though all are level.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6 (1979).
    """
    found, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = largest
    return found


def over_seeds(best: Sequence[float], other: Sequence[float]) -> PairedTest:
    """Student's t-test of the paired differences over seeds."""
    from scipy.stats import ttest_rel

    if len(best) < 2:
        return PairedTest(None, "not tested: one seed")
    differences = np.subtract(best, other)
    if np.ptp(differences) <= 1e-12 * max(1.0, float(np.abs(differences).max())):  # no spread: t is not defined
        return PairedTest(1.0 if abs(differences[0]) < 1e-12 else 0.0, f"paired t-test over {len(best)} seeds")
    return PairedTest(float(ttest_rel(best, other).pvalue), f"paired t-test over {len(best)} seeds")
