"""How runs and commands end that are cut short: by their own clock, by a signal, by numbers that are not finite."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.reliability.conftest import Note
from tests.reliability.runs import Server, contents, leftovers, logged
from tests.reliability.test_kills import ADAPTER, SEARCH, uninterrupted
from tests.reliability.test_two_processes import stopped

every = pytest.mark.reliability
FOR_GOOD = ["training.lr=1000", "training.max_grad_norm=0", "training.max_bad_steps=50"]


@pytest.fixture(scope="module")
def adapter(server: Server, folder: Path) -> Path:
    return uninterrupted(server, ADAPTER, folder / "adapter")


@pytest.fixture(scope="module")
def searched(server: Server, folder: Path) -> Path:
    return uninterrupted(server, SEARCH, folder / "searched")


@every
def test_a_run_ends_after_its_hours(server: Server, adapter: Path, tmp_path: Path, note: Note) -> None:
    """It is asleep in its fourth step until they are over."""
    run, seconds = tmp_path / "run", 20.0
    command = [*ADAPTER, f"output.dir={run}"]
    process = server.start(*command, f"output.max_hours={seconds / 3600}", failpoint="step.before:4:stop")
    stopped(process)
    time.sleep(max(0.0, process.began + seconds + 3 - time.monotonic()))
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait() == 75 and "Traceback" not in process.said(), process.said()
    said = process.said()
    assert said.count("told to end (output.max_hours) after step 3 of 6") == 1 and "This goes on:\n" in said, said
    steps = [path.name for path in (run / "checkpoints").iterdir()]
    code, said = server.run(*command, "output.max_hours=1")
    assert code == 0 and "resumed after step" in said, said
    assert contents(run / "adapter") == contents(adapter / "adapter") and logged(run) == logged(adapter)
    note("output.max_hours", "a checkpoint, exit code 75; same bytes", f"75; {', '.join(steps)}; same bytes")


def test_a_launch_ends_after_a_step_and_the_test_rows_are_scored_later(
    server: Server, adapter: Path, tmp_path: Path, note: Note
) -> None:
    run = tmp_path / "run"
    command = [*ADAPTER, f"output.dir={run}"]
    for already in (0, 3):
        code, said = server.run(*command, "output.stop_after=3", "evaluation.test=false")
        assert code == 75 and "told to end (output.stop_after) after step 3 of 6" in said, said
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-3"], f"{already} steps were done"
    code, said = server.run(*command, "evaluation.test=false")
    summary, whole = (json.loads((path / "summary.json").read_text()) for path in (run, adapter))
    assert code == 0 and "test" not in summary and summary["validation"] == whole["validation"], said
    more = ["evaluation.row_scores=true", "evaluation.forgetting=embedded:tinyshakespeare"]
    code, said = server.run(*command, *more)
    summary, table = (json.loads((run / name).read_text()) for name in ("summary.json", "test_rows.json"))
    assert code == 0 and summary["test"] == whole["test"], said
    losses, targets = (sum(row[column] for row in table["scores"]) for column in (0, 1))
    assert len(table["scores"]) == 8 and losses / targets == pytest.approx(summary["test"]["test/loss"], abs=1e-9)
    before, after = summary["forgetting"]["before"], summary["forgetting"]["after"]
    assert before == pytest.approx(5.9, abs=0.3) and 0 < abs(after - before) < 5  # random weights: ln(vocabulary)
    assert contents(run / "adapter") == contents(adapter / "adapter") and logged(run) == logged(adapter)
    note("output.stop_after, evaluation.test=false", "75; the same bytes and scores later", "75; the same")


@pytest.mark.parametrize(
    ("alpha", "bad"),
    [pytest.param("1e38", 4, marks=every, id="none applied"), pytest.param("1e18", 3, id="the last were bad")],
)
def test_a_run_that_is_not_finite_for_good_fails(
    alpha: str, bad: int, server: Server, tmp_path: Path, note: Note
) -> None:
    """With 1e38 no gradient is finite, with 1e18 only the first: 50 skipped steps in a row would be allowed."""
    run = tmp_path / "run"
    code, said = server.run(*ADAPTER, *FOR_GOOD, f"adapter.alpha={alpha}", "training.steps=4", f"output.dir={run}")
    assert code == 1 and "Traceback" not in said, said
    assert f"{bad} steps in a row up to step 4 had a loss or gradient that is not finite. First bad module: " in said, (
        said
    )
    assert not (run / "adapter").exists()
    assert not (run / "summary.json").exists() or "steps" not in json.loads((run / "summary.json").read_text())
    note(f"not finite, {bad} of 4 steps up to the last", "exit code 1, no adapter", "1, with a module; no adapter")


COMMANDS = {
    "merge": ("merge.before_shard:1", False),
    "merge, verified": ("merge.before_verify:1", True),
    "evaluate": ("evaluation.before_batch:1", False),
}


@pytest.mark.parametrize(("action", "code"), [("int", 130), ("term", 143)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "merge" else [every]) for name in COMMANDS])
def test_a_command_is_interrupted(
    name: str, action: str, code: int, server: Server, adapter: Path, tmp_path: Path, note: Note
) -> None:
    place, is_set_aside = COMMANDS[name]
    out = tmp_path / "out"
    command = ["evaluate", str(adapter)] if name == "evaluate" else ["merge", str(adapter), "--out", str(out)]
    got, said = server.run(*command, failpoint=f"{place}:{action}")
    assert got == code and "Traceback" not in said, said
    assert leftovers(tmp_path) == [] and not out.exists()
    assert (tmp_path / "out.failed").exists() == is_set_aside
    got, said = server.run(*command)
    assert got == 0, said
    note(
        f"glora-llm {name}, {action}", f"exit code {code}, nothing half-written", f"{code}; the same command ended well"
    )


@every
@pytest.mark.parametrize(("action", "code"), [("int", 130), ("term", 143)])
def test_a_search_alone_is_interrupted(
    action: str, code: int, server: Server, searched: Path, tmp_path: Path, note: Note
) -> None:
    run = shutil.copytree(searched, tmp_path / "run", ignore=shutil.ignore_patterns("search", "genome.json"))
    got, said = server.run("search", str(run), failpoint=f"search.before_scores:2:{action}")
    assert got == code and "Traceback" not in said and leftovers(run) == [], said
    known = len((run / "search" / "journal.jsonl").read_text().splitlines())
    got, said = server.run("search", str(run))
    assert got == 0 and (run / "genome.json").read_bytes() == (searched / "genome.json").read_bytes(), said
    note(f"glora-llm search, {action}", f"exit code {code}; it goes on", f"{code}; {known} lines kept; the same genome")
