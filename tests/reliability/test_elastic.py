"""Every change of 1, 2 and 4 processes, to every ZeRO stage: an adapter, a whole or distilled model, a supernet."""

from pathlib import Path

import pytest

from tests.in_process import alone, one_thread
from tests.reliability.conftest import Note
from tests.run.test_train import write_rows
from tests.training.elastic import KINDS, Change, Launched, check_end, check_restored, check_samples, train_and_go_on

__all__ = ["alone", "one_thread"]
pytestmark = pytest.mark.reliability
SAVED_UNDER = {1: "zero2", 2: "zero3", 4: "zero1"}  # processes -> the stage that their runs are trained under
STAGES = ("zero0", "zero1", "zero2", "zero3")
CHANGES = [
    Change(Launched(kind, old, SAVED_UNDER[old]), Launched(kind, new, stage))
    for kind in KINDS
    for old in SAVED_UNDER
    for new in SAVED_UNDER
    if new != old
    for stage in STAGES
] + [Change(Launched("adapter", 2, "zero3"), Launched("adapter", 2, stage)) for stage in ("zero0", "zero2_offload")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path, alone: None) -> Path:
    """The run folders of all changes."""
    out = tmp_path_factory.mktemp("elastic")
    write_rows(out / "data.jsonl", 60)
    train_and_go_on(out, CHANGES)
    return out


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_run_goes_on_as_if_nothing_had_changed(runs: Path, change: Change, note: Note) -> None:
    check_samples(runs, change)
    check_restored(runs, change)
    worst = check_end(runs, change)
    note(str(change), "same samples, state exact, loss to 1e-5", f"loss to {worst:.0e}")
