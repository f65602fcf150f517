"""Scores of what was chosen against what is right, over all rows of a split, by scikit-learn and SciPy.

They are taken of the whole table of `evaluation.scoring.score_rows`, so neither the batch size nor the number of
processes plays a part.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from glora_llm.errors import UserError, nearest
from glora_llm.schema import Recipe
from glora_llm.schema.benchmarks import benchmark_of
from glora_llm.schema.scores import score_of
from glora_llm.tasks.task import COLUMNS

Values = NDArray[np.float64]
Metric = Callable[[Values, Values], float]  # predicted (R), reference (R)


def accuracy(predicted: Values, reference: Values) -> float:
    """Return the share of rows whose class is right."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(reference.astype(int), predicted.astype(int)))


def f1(predicted: Values, reference: Values) -> float:
    """Return the F1 of class 1 where no class but 0 and 1 occurs (as GLUE does), else the mean of the classes' F1."""
    from sklearn.metrics import f1_score

    right, chosen = reference.astype(int), predicted.astype(int)
    binary = max(right.max(), chosen.max()) <= 1
    return float(f1_score(right, chosen, average="binary" if binary else "macro", zero_division=0.0))


def matthews_correlation(predicted: Values, reference: Values) -> float:
    """Return Matthews correlation, 0 where one class alone was chosen."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(reference.astype(int), predicted.astype(int)))


def pearson(predicted: Values, reference: Values) -> float:
    """Return Pearson correlation, 0 where all numbers of one side are the same."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, reference)


def spearman(predicted: Values, reference: Values) -> float:
    """Return Spearman rank correlation, 0 where all numbers of one side are the same."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, reference)


def mean_squared_error(predicted: Values, reference: Values) -> float:
    """Return the mean squared error."""
    return float(((predicted - reference) ** 2).mean())


CLASS_METRICS: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "matthews_correlation": matthews_correlation}
NUMBER_METRICS: dict[str, Metric] = {
    "pearson": pearson,
    "spearman": spearman,
    "mean_squared_error": mean_squared_error,
}
METRICS = CLASS_METRICS | NUMBER_METRICS


def wanted_metrics(recipe: Recipe, has: Sequence[str], task: str) -> tuple[str, ...]:
    """Return the scores that a recipe asks for by evaluation.metrics, else those of its benchmark that the task has.

    Args:
        has: every score of the task.
        task: its name, for messages.

    Raises:
        UserError: for a name that is no score, or none of this task.
    """
    asked = recipe.evaluation.metrics
    if asked is None:
        known = benchmark_of(recipe.data.benchmark).metrics if recipe.data.benchmark else ()
        return tuple(name for name in known if name in has)
    for name in asked:
        score_of(name)
        if name not in has:
            raise UserError(
                f"evaluation.metrics names '{name}', which {task} does not have.{nearest(name, has)} It has: "
                f"{', '.join(has)}."
            )
    return tuple(asked)


def scores_of(table: Tensor, names: Sequence[str], classes: Sequence[int] | None = None) -> dict[str, float]:
    """Return these scores of a table (R, C) of `score_rows`; names that are no key of METRICS are left out.

    Args:
        classes: class number of each choice that the table holds; None: they are class numbers, or numbers.
    """
    chosen = [name for name in dict.fromkeys(names) if name in METRICS]
    if not chosen:
        return {}
    predicted, reference = (table[:, COLUMNS.index(name)].numpy() for name in ("predicted", "reference"))
    if classes is not None:
        known = np.array(classes, dtype=np.float64)
        predicted, reference = known[predicted.astype(int)], known[reference.astype(int)]
    return {name: METRICS[name](predicted, reference) for name in chosen}


def _correlation(function: Callable[..., tuple[float, float]], predicted: Values, reference: Values) -> float:
    if len(predicted) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input, for which nan is given
        value = float(function(predicted, reference)[0])
    return value if np.isfinite(value) else 0.0
