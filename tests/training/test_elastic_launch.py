"""A run goes on with another number of processes, under another ZeRO stage, as if nothing had changed.

The uninterrupted run is one of two processes. Its checkpoint of step 2 is gone on from by one process, and by four.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.in_process import alone, forget_launch, one_thread
from tests.run.test_train import write_rows
from tests.training.elastic_worker import do
from tests.training.launching import finished, launch, metrics

__all__ = ["alone", "one_thread"]
pytestmark = pytest.mark.launch
STEPS, SAVED, GLOBAL_BATCH = 4, 2, 8
# What is trained -> recipe and overrides. Dropout draws alike on any number of processes too.
KINDS: dict[str, tuple[str, list[str]]] = {
    "adapter": ("tiny_cpu", ["adapter.dropout=0.1"]),
    "whole model": ("tiny_cpu", ["adapter.method=full", "adapter.slots=null", "training.lr=1e-3"]),
    "supernet": ("tiny_cpu_search", ["search=null", "adapter.targets=[k_proj, down_proj]"]),
}
# (what is trained, ZeRO stage of two processes) -> (processes, ZeRO stage) that go on.
CHANGES = {
    ("adapter", "zero1"): [(1, "zero0"), (1, "zero3"), (4, "zero2")],
    ("whole model", "zero3"): [(1, "zero1"), (4, "zero1")],
    ("supernet", "zero2"): [(1, "zero2"), (4, "zero3")],
}
CASES = [(*source, *goal) for source, goals in CHANGES.items() for goal in goals]


def job(out: Path, kind: str, stage: str, run: Path) -> dict[str, Any]:
    """Return what elastic_worker.py does in one run folder."""
    recipe, more = KINDS[kind]
    overrides = [
        f"training.steps={STEPS}", "training.warmup=0", f"training.global_batch={GLOBAL_BATCH}",
        "training.micro_batch=2", f"training.deepspeed={stage}", f"data.source={out / 'data.jsonl'}",
        "data.validation=8", "data.test=null", "data.max_rows=null", "data.max_test_rows=null",
        f"output.save_every={SAVED}", "output.keep=2", "merge.after_training=false", *more,
    ]  # fmt: skip
    return {"recipe": recipe, "run": str(run), "overrides": overrides}


def launched(out: Path, name: str, jobs: list[dict[str, Any]], processes: int) -> None:
    """Do jobs in one launch of processes with one thread each."""
    (out / f"{name}.json").write_text(json.dumps(jobs))
    command = launch("tests/training/elastic_worker.py", str(out / f"{name}.json"), ranks=processes)
    done = finished(command, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (out / f"{name}.txt").write_text(done.stdout)


def interrupted(whole: Path, run: Path) -> Path:
    """Return a copy of a run folder as a launch leaves it that was killed after the checkpoint of step 2."""
    shutil.copytree(whole, run)
    for folder in (f"checkpoints/step-{STEPS}", "adapter", "model"):
        shutil.rmtree(run / folder, ignore_errors=True)
    (run / "summary.json").unlink()
    return run


def place(out: Path, kind: str, stage: str, processes: int = 2, goal: str = "") -> Path:
    return out / "-".join([kind.replace(" ", "_"), stage, str(processes), goal])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path, alone: None) -> Path:
    """The run folders: what two processes trained, and what one and four made of it."""
    out = tmp_path_factory.mktemp("elastic")
    write_rows(out / "data.jsonl", 60)
    launched(out, "two", [job(out, *source, place(out, *source)) for source in CHANGES], 2)
    later: dict[int, list[dict[str, Any]]] = {1: [], 4: []}
    for kind, stage, processes, goal in CASES:
        run = interrupted(place(out, kind, stage), place(out, kind, stage, processes, goal))
        later[processes].append(job(out, kind, goal, run))
    launched(out, "four", later[4], 4)
    do(later[1])
    forget_launch()
    return out


def samples(run: Path, processes: int) -> dict[str, list[int]]:
    """Return step -> the rows of all processes, in the global order of their micro batches."""
    found = [json.loads((run / f"samples-{number}.json").read_text()) for number in range(processes)]
    steps = found[0].keys()
    return {
        step: [
            row for together in zip(*(one[step] for one in found), strict=True) for micro in together for row in micro
        ]
        for step in steps
    }


@pytest.mark.parametrize(("kind", "stage", "processes", "goal"), CASES)
def test_the_samples_of_every_step_are_the_same(runs: Path, kind: str, stage: str, processes: int, goal: str) -> None:
    expected = samples(place(runs, kind, stage), 2)
    got = samples(place(runs, kind, stage, processes, goal), processes)
    assert list(got) == [str(step) for step in range(SAVED, STEPS)]
    assert got == {step: expected[step] for step in got}
    assert all(len(rows) == GLOBAL_BATCH for rows in got.values())


@pytest.mark.parametrize(("kind", "stage", "processes", "goal"), CASES)
def test_weights_and_moments_are_restored_exactly(runs: Path, kind: str, stage: str, processes: int, goal: str) -> None:
    assert json.loads((place(runs, kind, stage, processes, goal) / "restored.json").read_text()) == [0.0]


@pytest.mark.parametrize(("kind", "stage", "processes", "goal"), CASES)
def test_the_run_ends_like_the_uninterrupted_one(runs: Path, kind: str, stage: str, processes: int, goal: str) -> None:
    whole, run = place(runs, kind, stage), place(runs, kind, stage, processes, goal)
    for key in ("train/loss", "train/grad_norm", "validation/loss", "train/lr"):
        assert metrics(run, key) == pytest.approx(metrics(whole, key), rel=1e-5) and metrics(run, key), key
    expected, got = (
        load_file(folder / "checkpoints" / f"step-{STEPS}" / "state.safetensors") for folder in (whole, run)
    )
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_what_changes_is_said_before_training_goes_on(runs: Path) -> None:
    said = (runs / "four.txt").read_text()
    assert "going on with processes 2 -> 4, ZeRO stage 1 -> 2: the samples of each step" in said
    assert "not kept" not in said
