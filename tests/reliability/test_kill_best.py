"""SIGKILL in a run that keeps its best checkpoint and ends early: the same command deploys the same weights."""

import json
from pathlib import Path

import pytest

from tests.reliability.conftest import Note
from tests.reliability.runs import Server, contents, leftovers, logged
from tests.reliability.test_kills import SAME, cases, killed_once, seen, uninterrupted

BEST = [
    "train", "--recipe", "tiny_cpu", "training.steps=12", "training.lr=0.06", "training.schedule=constant",
    "training.warmup=0", "training.global_batch=4", "training.micro_batch=2", "data.max_rows=24", "data.validation=8",
    "data.max_test_rows=8", "evaluation.every=2", "evaluation.keep_best=label_accuracy", "evaluation.patience=2",
    "output.save_every=3", "output.keep=1",
]  # fmt: skip
PLACES = [
    *(f"metrics.after_write:{count}" for count in (3, 6, 9)),
    *(f"evaluation.after:{count}" for count in (2, 3, 4, 5, 6)),
    *(
        f"checkpoint.{name}:{count}"
        for name in ("before_gather", "after_trainer", "after_write")
        for count in (2, 3, 4)
    ),
    *(f"rotation.{name}:{count}" for name in ("before_delete", "in_delete", "after_delete") for count in (1, 2)),
    *(f"folder.before_rename:{count}" for count in (2, 3, 4)),
    *("result.before", "result.after_weights", "result.after", "result.after_summary"),
]


def kept(run: Path) -> tuple[set[str], object]:
    """Return the checkpoints of a run, and what its summary says of the best."""
    summary = json.loads((run / "summary.json").read_text())
    return {path.name for path in (run / "checkpoints").iterdir()}, [
        summary[key] for key in ("best", "deployed_step", "steps", "stopped_early", "validation", "test")
    ]


@pytest.fixture(scope="module")
def best(server: Server, folder: Path) -> Path:
    run = uninterrupted(server, BEST, folder / "best")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["deployed_step"] < summary["steps"] < 12, "or the test shows nothing"
    return run


@pytest.mark.reliability
@pytest.mark.parametrize("case", cases(PLACES))
def test_the_best(case: str, server: Server, best: Path, tmp_path: Path, note: Note) -> None:
    command = [*BEST, f"output.dir={tmp_path / 'run'}"]
    said = killed_once(server, command, case)
    assert contents(tmp_path / "run" / "adapter") == contents(best / "adapter")
    assert logged(tmp_path / "run") == logged(best), "each step once, with the same numbers"
    assert kept(tmp_path / "run") == kept(best)
    assert leftovers(tmp_path / "run") == [] and "Traceback" not in said
    note(f"the best checkpoint, {case}", SAME, seen(said))
