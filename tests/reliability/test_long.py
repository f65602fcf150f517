"""A long run: memory and open files stay, no step is slower than the early ones."""

import re
import statistics
import time
from pathlib import Path

import psutil
import pytest

from tests.reliability.conftest import Note
from tests.reliability.runs import Server, logged_values

pytestmark = pytest.mark.reliability
STEPS = 2000
SETTINGS = ["training.global_batch=4", "data.max_rows=64", "data.validation=8", "data.max_test_rows=8",
            "output.save_every=100", "evaluation.every=500"]  # fmt: skip
MORE_MB, MORE_TIME = 8.0, 1.25


def quiet(values: list[float]) -> float:
    """Return the fastest tenth's upper end: other processes of the machine only ever add time."""
    return statistics.quantiles(values, n=10)[0]


def test_two_thousand_steps(server: Server, tmp_path: Path, note: Note) -> None:
    run = tmp_path / "run"
    command = ["train", "--recipe", "tiny_cpu", *SETTINGS, f"training.steps={STEPS}", f"output.dir={run}"]
    process = server.start(*command)
    watched = psutil.Process(process.pid)
    seen: dict[int, tuple[float, int]] = {}  # step -> resident MB, open files
    while server.ask({"poll": process.pid}) is None:
        try:
            held = watched.memory_info().rss / 1e6, watched.num_fds()
        except psutil.NoSuchProcess:
            break
        steps = re.findall(r"^step (\d+)/", process.said()[-4000:], flags=re.MULTILINE)
        if steps:
            seen[int(steps[-1])] = held
        time.sleep(0.5)
    times = logged_values(run, "train/seconds_per_step")
    assert len(times) == STEPS, process.said()
    early = [held for step, held in seen.items() if 200 <= step <= 700]
    late = [held for step, held in seen.items() if 1500 <= step < STEPS]
    assert early and late, sorted(seen)
    growth = statistics.median(mb for mb, _ in late) - statistics.median(mb for mb, _ in early)
    files = max(count for _, count in late) - max(count for _, count in early)
    before = quiet([times[step] for step in range(200, 700)])
    after = quiet([times[step] for step in range(1500, STEPS)])
    note(
        f"{STEPS} steps of tiny_cpu", f"memory + {MORE_MB:g} MB at most, no more files, steps x {MORE_TIME:g} at most",
        f"{growth:+.1f} MB, {files:+d} files, {1e3 * before:.1f} to {1e3 * after:.1f} ms a step",
    )  # fmt: skip
    assert growth < MORE_MB and files <= 0 and after < MORE_TIME * before
