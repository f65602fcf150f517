"""Metrics of the gathered table against scikit-learn and SciPy on the whole; label words as classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn

from glora_llm import recipe as recipes
from glora_llm.errors import UserError
from glora_llm.evaluation.scoring import score_rows
from glora_llm.plan.elsewhere import recipe_for_merge
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.tasks.metrics import METRICS, scores_of
from glora_llm.training.objectives import TokenScores, _scores

ROWS = 53


def gathered(predicted: Any, reference: Any, world: int, batch: int) -> torch.Tensor:
    """Return the table of made-up answers, as `world` processes fill it and sum it."""

    def score(given: dict[str, torch.Tensor]) -> TokenScores:
        rows = given["rows"]
        right = torch.from_numpy(predicted == reference)[rows]
        where, loss = torch.arange(len(rows)), torch.ones(len(rows))
        chosen, wanted = (torch.from_numpy(values)[rows] for values in (predicted, reference))
        return TokenScores(where, loss, right, right, chosen, wanted)

    lengths = (np.arange(ROWS) * 7 % 11 + 2).tolist()  # rows of like length share a batch: not in their own order
    tables = [
        score_rows(lengths, lambda rows: {"rows": torch.tensor(rows)}, score, lambda made: made, batch, rank, world)
        for rank in range(world)
    ]
    return torch.stack(tables).sum(0)


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 3), (2, 8)])
def test_each_metric_is_that_of_the_library_on_the_whole(world: int, batch: int) -> None:
    draw = np.random.default_rng(5)
    two, three = list(draw.integers(0, 2, (2, ROWS))), list(draw.integers(0, 3, (2, ROWS)))
    numbers = list(draw.normal(size=(2, ROWS)) + np.linspace(0, 3, ROWS))
    expected = {
        "accuracy": sklearn.accuracy_score(two[1], two[0]),
        "f1": sklearn.f1_score(two[1], two[0]),
        "matthews_correlation": sklearn.matthews_corrcoef(two[1], two[0]),
    }
    assert scores_of(gathered(two[0], two[1], world, batch), list(expected)) == pytest.approx(expected, rel=1e-12)
    macro = {"f1": sklearn.f1_score(three[1], three[0], average="macro")}
    assert scores_of(gathered(three[0], three[1], world, batch), ["f1"]) == pytest.approx(macro, rel=1e-12)
    of_numbers = {
        "pearson": stats.pearsonr(numbers[0], numbers[1])[0],
        "spearman": stats.spearmanr(numbers[0], numbers[1])[0],
        "mean_squared_error": sklearn.mean_squared_error(numbers[1], numbers[0]),
    }
    assert scores_of(gathered(numbers[0], numbers[1], world, batch), list(of_numbers)) == pytest.approx(
        of_numbers, rel=1e-12
    )
    assert set(expected) | set(of_numbers) == set(METRICS)
    swapped = {"f1": sklearn.f1_score(1 - two[1], 1 - two[0])}  # choices are listed in another order than classes
    assert scores_of(gathered(two[0], two[1], world, batch), ["f1"], [1, 0]) == pytest.approx(swapped, rel=1e-12)


def test_an_answer_that_never_changes_has_no_correlation() -> None:
    constant, other = np.ones(ROWS), np.arange(ROWS, dtype=float)
    table = gathered(constant, other, 1, 8)
    assert scores_of(table, ["pearson", "spearman"]) == {"pearson": 0.0, "spearman": 0.0}
    one_class = gathered(np.zeros(ROWS, int), (other % 2).astype(int), 1, 8)
    assert scores_of(one_class, ["f1", "matthews_correlation"]) == {"f1": 0.0, "matthews_correlation": 0.0}


def plan_of(tmp_path: Path, *more: str) -> Any:
    rows = "".join(f'{{"text": "card {n}", "label": {n % (3 if "d]" in more[-1] else 2)}}}\n' for n in range(24))
    (tmp_path / "rows.jsonl").write_text(rows)
    changes = [f"data.source={tmp_path / 'rows.jsonl'}", "data.test=8", "data.validation=null", "data.max_rows=null"]
    return make_plan(recipes.load("tiny_cpu", [*changes, "data.max_test_rows=null", *more]))


def test_label_words_give_their_class(tmp_path: Path) -> None:
    """Choices are in the order of token ids, classes in that of data.labels; here the two differ."""
    plan = plan_of(tmp_path, "data.labels=[yes, no]", "evaluation.metrics=[f1, accuracy, matthews_correlation]")
    task, random = plan.task, torch.Generator().manual_seed(1)
    assert task.first_classes == [1, 0]
    batch = task.batch(task.test, list(range(8)))
    width, vocabulary = batch["input_ids"].shape[1], len(task.tokenizer)
    by_row = batch["target_index"] // width
    logits = torch.randn(len(by_row), vocabulary, generator=random)
    scored = TokenScores(by_row, *_scores(logits, batch["targets"], batch["label_choices"]))
    table = score_rows([1] * 8, lambda numbers: {}, lambda _: scored, lambda whole: whole, 8)

    y, n = (task.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
    places = [at for at, target in enumerate(batch["targets"].tolist()) if target in (y, n)]
    predicted = [int(logits[at, n] > logits[at, y]) for at in places]
    reference = [int(task.test.row(number).label) for number in range(8)]
    assert len(places) == 8 and 0 < sum(predicted) < 8
    assert reference == [int(batch["targets"][at] == n) for at in places]
    scores = task.means(table, "test")
    assert scores["test/accuracy"] == sklearn.accuracy_score(reference, predicted)
    assert scores["test/f1"] == sklearn.f1_score(reference, predicted)
    assert scores["test/matthews_correlation"] == sklearn.matthews_corrcoef(reference, predicted)


def test_a_merge_asks_for_no_score_of_the_task(tmp_path: Path) -> None:
    """It reads other rows than the run did, which have no classes."""
    recipe = recipes.load("tiny_cpu", ["evaluation.metrics=[accuracy]"])
    plan = make_plan(recipe_for_merge(RunFolder(tmp_path), recipe))
    assert plan.recipe.evaluation.metrics is None and plan.recipe.data.format == "text"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.labels=[no, yes]", "evaluation.metrics=[f2]"], "'f2' is no score. Did you mean 'f1'"),
        (
            ["data.labels=[no, yes]", "evaluation.metrics=[pearson]"],
            "names 'pearson', which a classification by label words does not have",
        ),
        (
            ["evaluation.metrics=[f1]", "data.labels=[a b, a c, d]"],
            "f1 needs the class of every answer, and the label words a b, a c, d do not all differ",
        ),
        (["data.labels=[yes]"], "Class number 1 has no word"),
    ],
)
def test_metrics_and_labels_that_do_not_fit_are_refused(more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, *more)
