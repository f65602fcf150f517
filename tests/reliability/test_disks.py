"""A disk that is full, broken or read-only, for a while or for good: what is said, what is kept, and how a run ends."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.conftest import Note
from tests.reliability.runs import Server, contents, leftovers, logged
from tests.reliability.test_kills import ADAPTER, WHOLE, uninterrupted
from tests.reliability.test_two_processes import stopped

every = pytest.mark.reliability
PLACES = ("checkpoint.before_tensors", "checkpoint.after_tensors", "checkpoint.after_trainer", "folder.before_make",
          "folder.before_sync", "folder.between_syncs", "folder.before_rename")  # fmt: skip
SAID = {"enospc": "No space left on device", "eio": "Input/output error", "erofs": "Read-only file system"}
KEPT = "output.keep=5"


@pytest.fixture(scope="module")
def adapter(server: Server, folder: Path) -> Path:
    return uninterrupted(server, [*ADAPTER, KEPT], folder / "adapter")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        pytest.param(place, error, marks=[] if (place, error) == ("checkpoint.after_tensors", "enospc") else every)
        for place in PLACES
        for error in SAID
    ],
)
def test_a_checkpoint_cannot_be_written(
    place: str, error: str, server: Server, adapter: Path, tmp_path: Path, note: Note
) -> None:
    """The one of step 4: that of step 2 stays as it was, that of step 6 is tried again, and the run ends as any."""
    run, second = tmp_path / "run", 8 if place == "folder.between_syncs" else 2
    code, said = server.run(*ADAPTER, KEPT, f"output.dir={run}", failpoint=f"{place}:{second}:{error}")
    assert code == 0 and "Traceback" not in said, said
    assert said.count("warning: checkpoint of step 4 was not written") == 1 and SAID[error] in said, said
    assert "Kept: those of steps 2. Free " in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-6"]
    assert contents(run / "adapter") == contents(adapter / "adapter") and logged(run) == logged(adapter)
    first = contents(adapter / "checkpoints" / "step-2")
    assert contents(run / "checkpoints" / "step-2")["state.safetensors"] == first["state.safetensors"]
    assert leftovers(run) == []
    note(
        f"checkpoint, {place}, {error}", "a warning, older ones whole, same bytes", "warned; steps 2 and 6; same bytes"
    )


@pytest.mark.parametrize("error", [pytest.param("enospc", marks=every), "eio"])
def test_metrics_wait_in_memory(error: str, server: Server, adapter: Path, tmp_path: Path, note: Note) -> None:
    run = tmp_path / "run"
    places = ",".join(f"metrics.before_write:{count}:{error}" for count in (2, 3))
    code, said = server.run(*ADAPTER, KEPT, f"output.dir={run}", failpoint=places)
    assert code == 0 and said.count("metrics.jsonl cannot be written") == 1 and SAID[error] in said, said
    assert re.search(r"metrics.jsonl is written again, with the [23] lines since then", said), said
    assert logged(run) == logged(adapter) and contents(run / "adapter") == contents(adapter / "adapter")
    note(f"metrics.jsonl, {error} twice", "a warning, no line lost", "warned; all lines; same bytes")


@every
def test_metrics_and_tensorboard_never_written(server: Server, adapter: Path, tmp_path: Path, note: Note) -> None:
    run, places = tmp_path / "run", "metrics.before_write:1+:enospc,tensorboard.before_write:1+:enospc"
    code, said = server.run(*ADAPTER, KEPT, f"output.dir={run}", failpoint=places)
    assert code == 0 and "Traceback" not in said, said
    assert re.search(r"\d+ lines of .*metrics.jsonl could not be written and are lost", said)
    assert contents(run / "adapter") == contents(adapter / "adapter")
    note("metrics and TensorBoard never written", "warnings, exit code 0, same bytes", "warned; 0; same bytes")


def test_tensorboard_is_opened_again(server: Server, adapter: Path, tmp_path: Path, note: Note) -> None:
    run = tmp_path / "run"
    code, said = server.run(*ADAPTER, KEPT, f"output.dir={run}", failpoint="tensorboard.before_write:5:eio")
    assert code == 0 and said.count("tensorboard cannot be written") == 1, said
    assert "tensorboard is written again" in said and len(list((run / "tensorboard").glob("events*"))) == 2
    assert contents(run / "adapter") == contents(adapter / "adapter")
    note("TensorBoard, eio once", "a warning, written again from the next checkpoint on", "warned; a second file")


@pytest.mark.parametrize(
    ("command", "place"),
    [
        pytest.param(ADAPTER, "result.after_weights", id="adapter"),
        pytest.param(WHOLE, "model.after_weights", id="model", marks=every),
    ],
)
def test_the_final_weights_are_tried_again(
    command: list[str], place: str, server: Server, tmp_path: Path, note: Note
) -> None:
    run = tmp_path / "run"
    code, said = server.run(*command, f"output.dir={run}", failpoint=f"{place}:1:enospc")
    assert code == 0 and "Next try in 5 s" in said, said
    assert "steps" in json.loads((run / "summary.json").read_text()) and leftovers(run) == []
    note(f"final weights, {place}, enospc once", "a warning, then written", "warned; written")


@every
def test_final_weights_that_cannot_be_written(server: Server, adapter: Path, tmp_path: Path, note: Note) -> None:
    run = tmp_path / "run"
    command = [*ADAPTER, KEPT, f"output.dir={run}"]
    code, said = server.run(*command, failpoint="result.after_weights:1+:enospc")
    assert code == 1 and "Traceback" not in said and said.count("was not written") == 3, said
    assert "adapter cannot be written: " in said and "The checkpoint of step 6 is kept; free some space" in said
    assert not (run / "adapter").exists()
    code, said = server.run(*command)
    assert code == 0 and contents(run / "adapter") == contents(adapter / "adapter") and leftovers(run) == []
    note("final weights, enospc for a minute", "exit code 1, the checkpoint kept", "1; the same command wrote them")


@every
@pytest.mark.parametrize(
    ("file", "seen"), [("launches.jsonl", "warned; left out"), ("summary.json", "warned; written")]
)
def test_a_small_file_ends_no_run(
    file: str, seen: str, server: Server, adapter: Path, tmp_path: Path, note: Note
) -> None:
    run, order = tmp_path / "run", ("recipe.yaml", "base.json", "sample.json", "launches.jsonl", "summary.json")
    written = [name for name in order if (adapter / name).exists()]
    failpoint = f"file.before_write:{written.index(file) + 1}:enospc"
    code, said = server.run(*ADAPTER, KEPT, f"output.dir={run}", failpoint=failpoint)
    assert code == 0 and re.search(rf"warning: \S+{file} was not written", said), said
    assert contents(run / "adapter") == contents(adapter / "adapter")
    assert (run / file).exists() == ("written" in seen)
    note(f"{file}, enospc once", "a warning, and the run goes on", seen)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free."""
    with (disk / "filling").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return disk / "filling"
    raise AssertionError("it never was full")


def test_a_disk_that_is_full_for_two_checkpoints(server: Server, adapter: Path, small_disk: Path, note: Note) -> None:
    """Full from step 3 to the end of step 5: nothing is lost, and the run ends as if nothing had been."""
    run = small_disk / "run"
    places = "step.before:3:stop,step.before:6:stop"
    process = stopped(server.start(*ADAPTER, "output.keep=1", f"output.dir={run}", failpoint=places))
    filling = fill(small_disk)
    os.kill(process.pid, signal.SIGCONT)
    before = process.said()
    while "checkpoint of step 4 was not written" not in process.said():
        assert server.ask({"poll": process.pid}) is None, process.said()
    stopped(process)
    filling.unlink()
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait() == 0, process.said()
    said = process.said()
    assert "not written" not in before and said.count("was not written") == 1, said
    assert re.search(r"has 0.0 MB free, and \d.* MB are needed", said), said
    assert logged(run) == logged(adapter) and contents(run / "adapter") == contents(adapter / "adapter")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-6"] and leftovers(run) == []
    note("a full disk of 6 MB, steps 3 to 5", "warnings, then all is written; same bytes", "warned; nothing lost")


def test_a_start_on_a_full_disk_is_refused(server: Server, small_disk: Path, note: Note) -> None:
    fill(small_disk)
    code, said = server.run(*ADAPTER, f"output.dir={small_disk / 'run'}")
    assert code == 2 and "Traceback" not in said and " has 0.0 MB free; 2 checkpoints (output.keep 1" in said, said
    assert not (small_disk / "run" / "checkpoints").exists()
    note("a start on a full disk", "exit code 2, with the numbers", said.strip().splitlines()[-1][-60:])


def damaged(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        file.write_bytes({"truncated": data[:-1], "emptied": b"", "one bit flipped": flipped}[how])


@pytest.mark.parametrize("how", [pytest.param("truncated", marks=every), pytest.param("emptied", marks=every),
                                 "one bit flipped", pytest.param("missing", marks=every)])  # fmt: skip
@pytest.mark.parametrize("name", ["state.safetensors", *(pytest.param(name, marks=every) for name in (
    "trainer.json", "manifest.json", "adapter/adapter_model.safetensors"))])  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    name: str, how: str, server: Server, adapter: Path, tmp_path: Path, note: Note
) -> None:
    """The newest of three, of a run that was killed before its end."""
    run = tmp_path / "run"
    shutil.copytree(adapter, run, ignore=shutil.ignore_patterns("adapter", "summary.json", "step-6"))
    shutil.copytree(adapter / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    damaged(run / "checkpoints" / "step-6" / name, how)
    code, said = server.run(*ADAPTER, KEPT, f"output.dir={run}")
    assert code == 0 and "resumed after step 4" in said, said
    found = re.search(r"passed over broken checkpoint \S+step-6: (\S+) ", said)
    assert found is not None and (found[1] == name or (name == "manifest.json" and how == "one bit flipped")), said
    assert contents(run / "adapter") == contents(adapter / "adapter") and logged(run) == logged(adapter)
    note(
        f"checkpoint, {name} {how}",
        "named, the one before serves; same bytes",
        "named; went on from step 4; same bytes",
    )
