"""The interface of a task: what training, evaluation and merge ask of the data and of the model's answers."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from glora_llm.training.batch import Batch

# What evaluation fills in for every row (R, C), float64: the summed loss of its targets and their number; how many of
# them are the most likely ones; whether all are, and whether all are among the label words (images: whether the class
# is among the first five); what the model chose and what is right (a class, an option or a number); the UTF-8 bytes of
# the raw text that the targets stand for.
COLUMNS = ("loss", "targets", "correct", "all_correct", "among_labels", "predicted", "reference", "text_bytes")


class Rows(Protocol):
    """The rows of one split, read as they are asked for."""

    role: Any
    name: str

    def __len__(self) -> int:
        """Return the number of rows."""

    def row(self, i: int) -> Any:
        """Return row `i`, counted from 0."""

    def lengths(self) -> NDArray[np.int64]:
        """Return what each row costs; rows of like length are scored together."""

    def text_bytes(self) -> NDArray[np.int64] | None:
        """Return the UTF-8 bytes of raw text that the targets of every row stand for; None: rows are no such text."""

    def digest(self) -> str:
        """Return a SHA-256 over all that is learnt from: a resumed run must find it again."""

    def sealed(self, why: str) -> AbstractContextManager[None]:
        """Let every read of a row fail, while something is chosen that these rows will judge."""


class Described(Protocol):
    """Counts of the preparation of a split."""

    def describe(self) -> str:
        """Return it as one line."""


class Prepared(Protocol):
    """The prepared data of a run, and the commits of the hub's data sets that they were made of."""

    @property
    def commits(self) -> dict[str, str]: ...  # noqa: D102


Set_co = TypeVar("Set_co", covariant=True)
Report_co = TypeVar("Report_co", covariant=True)


class PreparedSplits(Prepared, Protocol[Set_co, Report_co]):
    """The prepared splits of a run: rows of tokens or images, and how they were made."""

    @property
    def train(self) -> Set_co: ...  # noqa: D102
    @property
    def validation(self) -> Set_co | None: ...  # noqa: D102
    @property
    def tests(self) -> Mapping[str, Set_co]: ...  # noqa: D102
    @property
    def reports(self) -> Mapping[str, Report_co]: ...  # noqa: D102
    @property
    def previews(self) -> list[str]: ...  # noqa: D102


class OnPreparedData(Generic[Set_co, Report_co]):
    """The splits of a task that reads them from its prepared `data`."""

    data: PreparedSplits[Set_co, Report_co]

    @property
    def train(self) -> Set_co:
        """The training rows."""
        return self.data.train

    @property
    def validation(self) -> Set_co | None:
        """The rows that choices are made by."""
        return self.data.validation

    @property
    def test(self) -> Set_co | None:
        """The rows that judge, the first set of several."""
        return next(iter(self.data.tests.values()), None)

    @property
    def tests(self) -> Mapping[str, Set_co]:
        """All test sets: `test`, or `test/NAME` of each of several."""
        return self.data.tests

    @property
    def reports(self) -> Mapping[str, Report_co]:
        """Counts of the preparation of each split."""
        return self.data.reports

    @property
    def previews(self) -> list[str]:
        """Some training samples as text, for the eye."""
        return self.data.previews


class Task(Protocol):
    """A task: the data, the objective and the scores of a run.

    Attributes:
        unit: what a row is made of, and speed is counted in: `tokens`, or `patches`.
        scored: what each loss and each comparison is of: `tokens`, or `images`.
        causal: attention sees what came before alone (half of its products are masked).
        data: what was prepared, and from which commits of the hub's data sets.
        test: the rows that judge, the first set of several.
        tests: all test sets by split: `test`, or `test/NAME` of each of several.
        reports: by split: what was read, kept, dropped.
        previews: some training samples as text, for the eye.
    """

    @property
    def data(self) -> Prepared: ...  # noqa: D102
    @property
    def unit(self) -> str: ...  # noqa: D102
    @property
    def scored(self) -> str: ...  # noqa: D102
    @property
    def causal(self) -> bool: ...  # noqa: D102
    @property
    def train(self) -> Rows: ...  # noqa: D102
    @property
    def validation(self) -> Rows | None: ...  # noqa: D102
    @property
    def test(self) -> Rows | None: ...  # noqa: D102
    @property
    def tests(self) -> Mapping[str, Rows]: ...  # noqa: D102
    @property
    def reports(self) -> Mapping[str, Described]: ...  # noqa: D102
    @property
    def previews(self) -> list[str]: ...  # noqa: D102

    def batch(self, rows: Any, indices: list[int]) -> Batch:
        """Return rows as the tensors of one forward pass, as they are scored."""

    def training_batch(self, indices: list[int], step: int, place: int) -> Batch:
        """Return training rows as one micro batch.

        Args:
            step: the optimizer step.
            place: where the first of these rows stands in the step's global batch: with the step it seeds what is
                random, so that it does not depend on the number of ranks.
        """

    def targets(self, rows: Any, index: int) -> int:
        """Return what one row counts in a mean loss."""

    def objective(self, model: nn.Module) -> Any:
        """Return the model wrapped for the engine (see `training.objectives.Objective`)."""

    def means(self, table: Tensor, split: str) -> dict[str, float]:
        """Return the scores of a table of `evaluation.scoring.score_rows`, named `SPLIT/...`."""

    def comparison(self, rows: Any, order: list[int]) -> tuple[list[Batch], int]:
        """Return the first rows as few batches, by which a merged model is compared, and how many rows they are."""

    def answers(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits (N, V) float32 of a batch, and the losses of its targets, both on the CPU."""

    def save_preprocessing(self, folder: Path) -> None:
        """Write what turns raw samples into the model's inputs, as transformers reads it."""
