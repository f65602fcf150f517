"""A launch of two processes: one is killed, one is told to end, in every phase; and a second launch in its folder."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.reliability.conftest import Note
from tests.reliability.runs import Run, Server, contents, leftovers, logged
from tests.reliability.test_kills import ADAPTER, SEARCH

TWO = [*ADAPTER, "training.micro_batch=2"]  # two micro batches a step on each process
every = pytest.mark.reliability
WITHIN = 30.0  # seconds after one process is gone


def both(runs: tuple[Run, Run]) -> tuple[list[int], str]:
    """Return the exit codes and what both said."""
    codes = [run.wait() for run in runs]
    return codes, "".join(run.said() for run in runs)


@pytest.fixture(scope="module")
def reference(server: Server, folder: Path) -> Path:
    """An adapter of two processes that nobody disturbed."""
    codes, said = both(server.start_two(*TWO, f"output.dir={folder / 'two'}"))
    assert codes == [0, 0], said
    return folder / "two"


def goes_on(server: Server, command: list[str], reference: Path, run: Path) -> str:
    """Give the same command again, and compare its adapter with the reference; return what it went on from."""
    codes, said = both(server.start_two(*command))
    assert codes == [0, 0], said
    assert contents(run / "adapter") == contents(reference / "adapter")
    assert logged(run) == logged(reference) and leftovers(run) == []
    found = re.search(r"resumed after (step \d+)", said)
    return found[1] if found else "the start"


@pytest.mark.parametrize(
    ("victim", "place"),
    [
        (1, "step.before_backward:7"),
        pytest.param(0, "step.before_forward:7", marks=every),
        pytest.param(1, "evaluation.before_batch:2", marks=every),
        pytest.param(0, "checkpoint.after_tensors:2", marks=every),
        pytest.param(1, "checkpoint.before_gather:2", marks=every),
    ],
)
def test_one_process_is_killed(
    victim: int, place: str, server: Server, reference: Path, tmp_path: Path, note: Note
) -> None:
    command = [*TWO, f"output.dir={tmp_path / 'run'}"]
    places = ("", place) if victim else (place, "")
    runs = server.start_two(*command, failpoints=places)
    assert runs[victim].wait() == -signal.SIGKILL, runs[victim].said()
    gone = time.monotonic()
    code, seconds = runs[1 - victim].wait(), time.monotonic() - gone
    said = runs[0].said() + runs[1].said()
    assert code not in (0, 75) and seconds < WITHIN, said
    assert said.count(f"process {victim} was killed (SIGKILL") == 1 and "failed first" not in said, said
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["process_rank"] == victim
    went_on = goes_on(server, command, reference, tmp_path / "run")
    note(
        f"process {victim} of two killed, {place}", "named; the other ends within 30 s; same bytes",
        f"named; ended after {seconds:.1f} s; went on from {went_on}; same bytes",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("told", "place", "steps"),
    [
        (1, "step.before_backward:3:usr1", [2]),  # in the first of two micro batches: the step is completed
        pytest.param(0, "step.before_backward:4:term", [2], marks=every),
        (1, "evaluation.before_batch:2:term", [4]),  # the validation after step 4
        pytest.param(0, "evaluation.before_batch:1:int", [2], marks=every),
        pytest.param(1, "evaluation.before_batch:4:term", [6], marks=every),  # test rows
    ],
)
def test_one_process_is_told_to_end(
    told: int, place: str, steps: list[int], server: Server, reference: Path, tmp_path: Path, note: Note
) -> None:
    command = [*TWO, f"output.dir={tmp_path / 'run'}"]
    began = time.monotonic()
    codes, said = both(server.start_two(*command, failpoints=("", place) if told else (place, "")))
    seconds = time.monotonic() - began
    assert codes == [75, 75] and seconds < 60, said
    assert "Traceback" not in said and said.count("This goes on") == 1, said
    saved = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == steps
    went_on = goes_on(server, command, reference, tmp_path / "run")
    note(
        f"process {told} of two told to end, {place}", "both end with 75; same bytes",
        f"75 and 75; checkpoints {saved}; went on from {went_on}; same bytes",
    )  # fmt: skip


@every
@pytest.mark.parametrize("told", [0, 1])
def test_one_process_is_told_to_end_in_a_search(told: int, server: Server, tmp_path: Path, note: Note) -> None:
    command = [*SEARCH, f"output.dir={tmp_path / 'run'}"]
    place = "search.before_scores:2:term"
    codes, said = both(server.start_two(*command, failpoints=("", place) if told else (place, "")))
    assert codes == [75, 75] and "Traceback" not in said, said
    lines = len((tmp_path / "run" / "search" / "journal.jsonl").read_text().splitlines())
    codes, said = both(server.start_two(*command))
    assert codes == [0, 0], said
    assert (tmp_path / "run" / "genome.json").is_file() and leftovers(tmp_path / "run") == []
    note(
        f"process {told} of two told to end, {place}",
        "both end with 75; the search goes on",
        f"75 and 75; {lines} lines",
    )


@every
def test_the_first_process_is_told_to_end_in_a_merge(
    server: Server, reference: Path, tmp_path: Path, note: Note
) -> None:
    run = shutil.copytree(reference, tmp_path / "run")
    command = [*TWO, "merge.after_training=true", f"output.dir={run}"]
    codes, said = both(server.start_two(*command, failpoints=("merge.before_shard:1:term", "")))
    assert codes == [75, 0] and "Traceback" not in said, said  # the second one had nothing to do any more
    codes, said = both(server.start_two(*command))
    assert codes == [0, 0] and (run / "merged" / "model.safetensors").is_file() and leftovers(run) == []
    note("process 0 of two told to end in a merge", "75; the same command merges", "75 (the other had ended); merged")


@every
@pytest.mark.parametrize("told", [0, 1])
def test_one_process_is_told_to_end_in_the_preparation(
    told: int, server: Server, reference: Path, tmp_path: Path, note: Note
) -> None:
    """Each has a cache of its own, as on two machines; the other waits for it in the rendezvous."""
    command, place = [*TWO, f"output.dir={tmp_path / 'run'}"], "cache.before_make:2:term"
    begun = time.monotonic()
    caches = ("", str(tmp_path / "cache")) if told else (str(tmp_path / "cache"), "")
    codes, said = both(server.start_two(*command, failpoints=("", place) if told else (place, ""), caches=caches))
    seconds = time.monotonic() - begun
    assert codes == [75, 75] and "Traceback" not in said, said
    assert not (tmp_path / "run").exists()
    went_on = goes_on(server, command, reference, tmp_path / "run")
    note(
        f"process {told} of two told to end in the preparation", "both end with 75; same bytes",
        f"75 and 75 after {seconds:.0f} s; went on from {went_on}; same bytes",
    )  # fmt: skip


def stopped(run: Run) -> Run:
    """Wait until a run has stopped itself."""
    limit = time.monotonic() + 120
    while Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < limit, run.said()
        time.sleep(0.02)
    return run


def test_a_second_run_in_the_same_folder(server: Server, folder: Path, tmp_path: Path, note: Note) -> None:
    """It is refused while the first one lives, asleep or not; after its SIGKILL the same command goes on."""
    command = [*TWO, f"output.dir={tmp_path / 'run'}"]
    first = stopped(server.start(*command, failpoint="step.before:4:stop"))
    code, said = server.run(*command)
    assert code == 2 and said.count("error: ") == 1, said
    assert f"is in use: process {first.pid} on {os.uname().nodename}, since " in said
    codes, said = both(server.start_two(*command))
    assert codes == [2, 2] and said.count("error: ") == 1, said
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0, first.said()
    steps = [step for step, values in logged(tmp_path / "run") if "train/loss" in values]
    assert steps == [1, 2, 3, 4, 5, 6] and leftovers(tmp_path / "run") == []

    command = [*TWO, f"output.dir={tmp_path / 'other'}"]
    first = stopped(server.start(*command, failpoint="step.before:4:stop"))
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    code, said = server.run(*command)
    assert code == 0 and "resumed after step 2" in said, said
    assert contents(tmp_path / "other" / "adapter") == contents(tmp_path / "run" / "adapter")
    note(
        "two runs in one folder", "the second is refused; the lock dies with its process", "refused by name; then free"
    )
