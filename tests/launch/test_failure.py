"""A failed process ends its launch, also when the others wait in a collective; a checkpoint is completed first."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glora_llm.launch.failure import first_failure
from glora_llm.launch.ranks import Processes, free_port

# Process 1 fails and does not leave: its connections stay open, so nothing tells process 0, which waits for it.
COLLECTIVE = """
import os, socket, sys
from pathlib import Path
import psutil, torch
from glora_llm.errors import UserError
from glora_llm.launch import ranks
from glora_llm.launch.failure import first_failure
from glora_llm.launch.outputs import print_line_by_line

def advice():
    other.wait()
    return "the other process is gone"

print_line_by_line()
processes = ranks.start()
group = torch.distributed.group.WORLD
print(f"timeout {group._get_backend(torch.device('cpu')).options._timeout}")
socket.gethostname = lambda: f"node{processes.process_rank}"
try:
    ranks.require_equal({"training data": "same", "base model": str(processes.process_rank)}, processes.world_size)
except UserError as error:
    print(error)
ranks.require_equal({"training data": "same"}, processes.world_size)
pids = [None, None]
torch.distributed.all_gather_object(pids, os.getpid())
other = psutil.Process(pids[0])
with first_failure(Path(sys.argv[1]), processes, advice):
    if processes.process_rank == 1:
        raise OSError("the disk of process 1 went away")
    torch.distributed.all_reduce(torch.zeros(1))
"""

# Waits as a collective does: no Python code of the main thread runs, so no signal handler either.
BLOCKED = """
import ctypes
from glora_llm.launch import stop

stop.ONE_REQUEST = 0.5
request = stop.StopRequest()
with request.listening(), request.deferred():
    print("blocked", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in "ab":  # the second time it waits for itself
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""

WRITING = """
import sys
from pathlib import Path
from glora_llm.atomic import whole_folder
from glora_llm.launch import failure
from glora_llm.launch.presence import Presence

failure.AFTER_FAILURE = 0.0
run = Path(sys.argv[1])
with failure.Watch(run / "failure.json", Presence(0), str):
    with whole_folder(run / "step-1") as folder:
        print("writing", flush=True)
        sys.stdin.readline()
        (folder / "weights").write_text("all of them")
    sys.stdin.readline()
    print("it went on", flush=True)
"""


def process(code: str, folder: Path, **more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"DS_ACCELERATOR": "cpu"} | more,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.launch
def test_a_failed_process_ends_one_that_waits_in_a_collective(tmp_path: Path) -> None:
    """Without a launcher's help, within 40 s of the failure on a machine that is not too busy.

    Before that they meet with a timeout of our own, and find that the models of their machines differ.
    """
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    waiting, failing = (process(COLLECTIVE, tmp_path, RANK=str(n), LOCAL_RANK=str(n), **group) for n in range(2))
    heard, last_words = waiting.communicate(timeout=300)  # and the other one may go
    said, failure = failing.communicate(timeout=300)
    seconds = time.time() - (tmp_path / "failure.json").stat().st_mtime
    print(f"both processes were gone {seconds:.1f} s after the failure")
    assert seconds < 120
    assert failing.returncode == 1 and waiting.returncode == 143, failure + last_words
    report = json.loads((tmp_path / "failure.json").read_text())
    assert report["process_rank"] == 1 and "the disk of process 1" in report["traceback"]
    assert said.splitlines()[:2] == heard.splitlines(), "both processes refuse inputs that differ"
    assert heard.startswith("timeout 2:00:00\nThe base model of node1 differs from that of node0. Give all machines")
    assert said.splitlines()[2:] == [
        "process 1 failed first: OSError: the disk of process 1 went away",
        "the other process is gone",
    ]
    assert failure.count("Traceback") == 1 and "Traceback" not in last_words
    assert "process 0 stopped, because another process failed first" in last_words


def test_a_second_sigterm_ends_a_process_that_cannot_handle_the_first(tmp_path: Path) -> None:
    blocked = process(BLOCKED, tmp_path)
    assert blocked.stdout is not None and blocked.stdout.readline() == "blocked\n"
    blocked.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        blocked.wait(timeout=2)
    limit = time.monotonic() + 300
    while blocked.poll() is None and time.monotonic() < limit:
        blocked.send_signal(signal.SIGTERM)  # of several that come at once one arrives
        time.sleep(0.1)
    assert blocked.returncode == 143
    assert blocked.communicate()[1].startswith("told to end a second time (SIGTERM): ended at once")


def test_a_checkpoint_is_completed_before_a_process_is_ended(tmp_path: Path) -> None:
    writing = process(WRITING, tmp_path)
    assert writing.stdout is not None and writing.stdout.readline() == "writing\n"
    (tmp_path / "failure.json").touch()
    time.sleep(2)  # enough for the watch to act too early, if it does
    assert writing.poll() is None
    assert writing.stdin is not None
    writing.stdin.write("\n")
    writing.stdin.flush()
    assert writing.wait(timeout=300) == 143
    assert (tmp_path / "step-1" / "weights").read_text() == "all of them"
    said, last_words = writing.communicate()
    assert said == "" and "another process failed first" in last_words


def test_a_note_that_cannot_be_written_hides_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a run folder on a disk that went read-only."""
    (tmp_path / "file").touch()
    processes = Processes(0, 1, torch.device("cpu"))
    with pytest.raises(OSError, match="the disk went away"), first_failure(tmp_path / "file", processes, str):
        raise OSError("the disk went away")
    printed = capsys.readouterr()
    assert "process 0 failed first: OSError: the disk went away" in printed.out
    assert "failure.json cannot be written ([Errno 20] Not a directory" in printed.err
