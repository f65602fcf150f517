"""One entry of the catalogue of public data sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["classification", "regression", "multiple_choice", "number_answer", "instruction", "text", "images"]


@dataclass(frozen=True)
class Benchmark:
    """A public data set, as the field splits, words and scores it.

    Args:
        kind: of task.
        title: what it asks, in a few words.
        format: data.format.
        source: data.source: a hub id, or `embedded:NAME`.
        metrics: scores that are reported of it, the main one first.
        paper: where it comes from: arXiv id or address.
        subset: configuration of the hub data set.
        train: split that is trained on; None: there is none.
        validation: held-out rows that choices are made by: a split, or a share or number of the training rows.
        test: split that judges, with labels: GLUE's own test labels are withheld, so its validation split is one.
        columns: role of the format -> name of the column.
        prompt: template over columns.
        labels: label words, by class number.
        more: further keys of the section `data`.
    """

    kind: Kind
    title: str
    format: str
    source: str
    metrics: tuple[str, ...]
    paper: str
    subset: str | None = None
    train: str | None = "train"
    validation: str | int | float | None = None
    test: str | int | float | None = None
    columns: Mapping[str, str] | None = None
    prompt: str | None = None
    labels: tuple[str, ...] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return the keys of the section `data` that this benchmark says something about."""
        found: dict[str, Any] = {
            "format": self.format,
            "source": self.source,
            "subset": self.subset,
            "split": self.train,
            "validation": self.validation,
            "test": self.test,
            "columns": self.columns and dict(self.columns),
            "prompt": self.prompt,
            "labels": self.labels and list(self.labels),
            **self.more,
        }
        return {name: value for name, value in found.items() if value is not None}
