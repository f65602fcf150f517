"""gpu-check itself: it passes on the CPU as a rehearsal, and a check that fails really fails."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_checks import kernels, run
from scripts.gpu_checks.context import Context
from scripts.gpu_checks.report import Row, absent, compared, information

ROOT = Path(__file__).parents[2]


def result(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "gpu_check.json").read_text()))


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.launch
def test_the_rehearsal_passes(tmp_path: Path) -> None:
    """All checks on the CPU; what it has no twin for is in the table, and the launches leave no shared memory."""
    shared = set(Path("/dev/shm").glob("deepspeed*"))
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    got = result(tmp_path / "out")
    assert got["passed"] and got["cause"] is None
    checks = {number: name for number, (name, _) in run.all_checks().items()}
    seen = {row["check"] for row in got["rows"]}
    assert seen == {f"{number} {name}" for number, name in checks.items()} and len(seen) == 9
    rows = {row["item"]: row for row in got["rows"]}
    assert rows["zero3-nf4, resumed after step 3"]["status"] == "ok"
    assert rows["zero2-nf4-paged_adamw_8bit"]["status"] == "not on this device"
    table = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "| SIGKILL to one process: all have ended | within 40 s |" in table
    assert set(Path("/dev/shm").glob("deepspeed*")) == shared


def test_an_expectation_that_is_not_met_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The GLoRA functions against float64 with a bound that no float32 keeps: the checks behind are not run."""
    monkeypatch.setattr(kernels, "BOUNDS", dict.fromkeys(kernels.BOUNDS, 0.0))
    assert run.run("cpu", tmp_path / "out", only=[2, 3]) == 1
    printed = capsys.readouterr()
    assert "failed in check 2 kernels: GLoRA product, float32: expected within 0e+00 of float64" in printed.err
    assert "3 attention" not in printed.out
    got = result(tmp_path / "out")
    assert not got["passed"] and got["cause"].startswith("2 kernels: CheckFailed: GLoRA product, float32")
    assert [row["status"] for row in got["rows"]] == ["ok", "ok", "ok", "failed"]


def test_a_check_that_breaks_leaves_its_cause_and_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(context: Context) -> Iterator[Row]:
        yield information("before", "1")
        yield absent("elsewhere", "no GPU")
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(run, "all_checks", lambda: {1: ("broken", broken)})
    with pytest.raises(RuntimeError, match="no such kernel"):
        run.run("cpu", tmp_path / "out")
    got = result(tmp_path / "out")
    assert got["cause"] == "1 broken: RuntimeError: no such kernel" and len(got["rows"]) == 2


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run.run("cuda", tmp_path / "out") == 2
    assert "--device cpu rehearses it" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_row_is_written_as_soon_as_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def steady(context: Context) -> Iterator[Row]:
        for number in range(3):
            seen.append(len(result(tmp_path / "out")["rows"]))
            yield compared(f"row {number}", "1", "1", True)

    monkeypatch.setattr(run, "all_checks", lambda: {1: ("steady", steady)})
    assert run.run("cpu", tmp_path / "out") == 0
    assert seen == [0, 1, 2] and result(tmp_path / "out")["passed"]
