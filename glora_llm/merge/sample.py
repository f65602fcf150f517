"""The text by which a merge is compared: a small sample of its data that a run keeps, else text that ships."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glora_llm.data.batch import cut
from glora_llm.data.store import Row
from glora_llm.plan.elsewhere import SHIPPED
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.training.batch import Batch

SAMPLE = "sample.json"
MOST_SAMPLES, MOST_TOKENS = 16, 256


class KeptRows:
    """The rows of a sample, for `tasks.task.Task.comparison`."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def row(self, index: int) -> Row:
        """Return one of them."""
        return self.rows[index]


def keep_sample(plan: Plan, folder: RunFolder) -> None:
    """Write RUN/sample.json: the tokens of up to 16 validation rows (or training rows), at most 256 of each.

    With `output.keep_sample=false` an earlier one is removed. Images are not kept: they are not small.
    """
    if plan.recipe.data.format == "images":
        return
    if not plan.recipe.output.keep_sample:
        (folder.path / SAMPLE).unlink(missing_ok=True)
        return
    rows = plan.task.validation or plan.task.train
    kept = [cut(rows.row(index), MOST_TOKENS) for index in plan.choice(rows, MOST_SAMPLES)]
    samples = [
        {"tokens": row.tokens.tolist(), "targets": _targets(row).astype(int).tolist(), "starts": row.starts}
        for row in kept
    ]
    text = json.dumps({"text": f"{len(kept)} {rows.name} rows", "samples": samples}, separators=(",", ":"))
    folder.write(SAMPLE, text + "\n")


def comparison_batches(plan: Plan, folder: RunFolder) -> tuple[list[Batch], str]:
    """Return the batches by which a merge is compared, and what they are in words.

    They are the sample that the run kept, else the text that ships with the package; where the plan has the data of
    the run itself (images), held-out rows of it, or training rows where none are held out.
    """
    kept, text = _read_sample(folder.path / SAMPLE)
    if kept:
        return plan.task.comparison(KeptRows(kept), list(range(len(kept))))[0], text
    rows = plan.task.validation or plan.task.test or plan.task.train
    batches, count = plan.task.comparison(rows, plan.choice(rows, None))
    shipped = plan.recipe.data.source == SHIPPED
    return batches, f"{count} rows of tinyshakespeare, which ships" if shipped else f"{count} {rows.name} rows"


def _targets(row: Row) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return the targets of a row, or all its tokens where a cut has left it none: there has to be a loss."""
    return row.targets if row.targets[1:].any() else np.ones_like(row.targets)


def _read_sample(file: Path) -> tuple[list[Row], str]:
    if not file.is_file():
        return [], ""
    content = json.loads(file.read_text(encoding="utf-8"))
    rows = [
        Row(np.array(sample["tokens"], dtype=np.int32), np.array(sample["targets"], dtype=bool), sample["starts"])
        for sample in content["samples"]
    ]
    return rows, content["text"]
