"""A run goes on with another number of processes, under another ZeRO stage, as if nothing had changed.

The uninterrupted run is one of two processes; its checkpoint of step 2 is gone on from by one process, and by four. All
other changes are in tests/reliability/test_elastic.py.
"""

from pathlib import Path

import pytest

from tests.in_process import alone, one_thread
from tests.run.test_train import write_rows
from tests.training.elastic import Change, Launched, check_end, check_restored, check_samples, train_and_go_on

__all__ = ["alone", "one_thread"]
pytestmark = pytest.mark.launch
CHANGES = [
    Change(Launched("adapter", 2, "zero1"), Launched("adapter", 1, "zero0")),
    Change(Launched("adapter", 2, "zero1"), Launched("adapter", 1, "zero3")),
    Change(Launched("adapter", 2, "zero1"), Launched("adapter", 4, "zero2")),
    Change(Launched("whole model", 2, "zero3"), Launched("whole model", 1, "zero1")),
    Change(Launched("whole model", 2, "zero3"), Launched("whole model", 4, "zero1")),
    Change(Launched("distilled", 2, "zero3"), Launched("distilled", 1, "zero1")),
    Change(Launched("supernet", 2, "zero2"), Launched("supernet", 1, "zero2")),
    Change(Launched("supernet", 2, "zero2"), Launched("supernet", 4, "zero3")),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path, alone: None) -> Path:
    """The run folders: what two processes trained, and what one and four made of it."""
    out = tmp_path_factory.mktemp("elastic")
    write_rows(out / "data.jsonl", 60)
    train_and_go_on(out, CHANGES)
    return out


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_samples_of_every_step_are_the_same(runs: Path, change: Change) -> None:
    check_samples(runs, change)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_weights_and_moments_are_restored_exactly(runs: Path, change: Change) -> None:
    check_restored(runs, change)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_run_ends_like_the_uninterrupted_one(runs: Path, change: Change) -> None:
    check_end(runs, change)


def test_what_changes_is_said_before_training_goes_on(runs: Path) -> None:
    said = (runs / "go-on-4.txt").read_text()
    assert "going on with processes 2 -> 4, ZeRO stage 1 -> 2: the samples of each step" in said
    assert "not kept" not in said
