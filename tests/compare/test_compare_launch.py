"""A comparison of real trials: killed and started again it ends as one that nobody killed, and runs nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.launching import PYTHONPATH

METHODS = ["lora", "glora", "ia3", "poly"]
SMALL = [
    "training.steps=4", "training.warmup=0", "training.global_batch=8", "data.max_rows=64", "data.validation=8",
    "data.max_test_rows=8", "evaluation.every=2", "output.save_every=1",
]  # fmt: skip
COMPARE = [
    sys.executable, "-m", "glora_llm", "compare", "--recipe", "tiny_cpu", "--methods", ",".join(METHODS),
    "--budget", "10k", "--seeds", "1", "--rates", "1e-2", *SMALL,
]  # fmt: skip
LONGEST = 400.0  # seconds


def start(out: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [*COMPARE, "--out", str(out)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def content(out: Path) -> dict[str, Any]:
    file = out / "comparison.json"
    return json.loads(file.read_text()) if file.is_file() else {"trials": {}}


def ended(out: Path) -> set[str]:
    return {name for name, trial in content(out)["trials"].items() if trial["status"] == "ended"}


def results(out: Path) -> list[dict[str, Any]]:
    """The rows of the table without what depends on the time."""
    of_time = ("tokens_per_second", "peak_gb", "seconds", "trials")
    return [{key: value for key, value in row.items() if key not in of_time} for row in content(out)["methods"]]


@pytest.mark.launch
@pytest.mark.reliability
def test_killed_and_started_again(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    said, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, said

    process = start(killed)
    limit = time.monotonic() + LONGEST
    while not ended(killed) and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {name: (killed / "trials" / name / "summary.json").stat().st_mtime_ns for name in ended(killed)}
    assert 0 < len(before) < 3, "it was killed in its midst"
    process = start(killed)
    again, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, again
    for name, changed in before.items():
        assert (killed / "trials" / name / "summary.json").stat().st_mtime_ns == changed
        assert f"{name} begins" not in again and f"{name} begins" in said
    assert results(killed) == results(whole)

    rows = {row["name"]: row for row in content(whole)["methods"]}
    assert list(rows) == METHODS
    assert [row["verdict"] for row in rows.values()].count("best") == 1
    assert rows["poly"]["verdict"] == "not run" and "does not train here" in rows["poly"]["why"]
    assert "poly not run: " in said
    assert rows["lora"]["parameters"] == rows["glora"]["parameters"] == 10_240 and rows["ia3"]["knob"] == "none"
    assert all(len(row["scores"]) == 1 and row["forgetting"] is not None for row in rows.values() if "mean" in row)
    assert {trial["status"] for trial in content(whole)["trials"].values()} == {"ended"}
