"""Runs that go on with another number of processes, under another ZeRO stage; compared with the uninterrupted ones."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.in_process import forget_launch
from tests.training.elastic_worker import do
from tests.training.launching import finished, launch, metrics

STEPS, SAVED, GLOBAL_BATCH = 4, 2, 8
# What is trained -> recipe and overrides. Dropout draws alike on any number of processes too.
KINDS: dict[str, tuple[str, list[str]]] = {
    "adapter": ("tiny_cpu", ["adapter.dropout=0.1"]),
    "whole model": ("tiny_cpu", ["adapter.method=full", "adapter.slots=null", "training.lr=1e-3"]),
    "distilled": (
        "tiny_cpu",
        [
            "adapter.method=full",
            "adapter.slots=null",
            "training.lr=1e-3",
            "model.gradient_checkpointing=true",
            "data.format=text",
            "data.prompt=null",
            "model.from_dense={budget: 0.8, calibration_rows: 2}",
            "training.distill={teacher: 'embedded:tiny-llama', states: 0.1}",
        ],
    ),
    "supernet": ("tiny_cpu_search", ["search=null", "adapter.targets=[k_proj, down_proj]"]),
}


class Launched(NamedTuple):
    """What is trained, by so many processes, under a ZeRO stage."""

    kind: str
    processes: int
    stage: str


class Change(NamedTuple):
    """A run of one launch that another one goes on with."""

    before: Launched
    after: Launched

    def __str__(self) -> str:
        old, new = self.before, self.after
        return f"{old.kind}: {old.processes} x {old.stage} -> {new.processes} x {new.stage}"


def run_folder(out: Path, *launches: Launched) -> Path:
    """Return the folder of a run, and of what later launches made of it."""
    return out / "--".join(f"{one.kind.replace(' ', '_')}-{one.processes}-{one.stage}" for one in launches)


def job(out: Path, launched: Launched, run: Path) -> dict[str, Any]:
    """Return what elastic_worker.py does in one run folder."""
    recipe, more = KINDS[launched.kind]
    overrides = [
        f"training.steps={STEPS}", "training.warmup=0", f"training.global_batch={GLOBAL_BATCH}",
        "training.micro_batch=2", f"training.deepspeed={launched.stage}", f"data.source={out / 'data.jsonl'}",
        "data.validation=8", "data.test=null", "data.max_rows=null", "data.max_test_rows=null",
        f"output.save_every={SAVED}", "output.keep=2", "merge.after_training=false", *more,
    ]  # fmt: skip
    return {"recipe": recipe, "run": str(run), "overrides": overrides}


def run_jobs(out: Path, name: str, jobs: list[dict[str, Any]], processes: int) -> None:
    """Do jobs: in this process, or in one launch of processes with one thread each, whose output goes to NAME.txt."""
    if processes == 1:
        do(jobs)
        forget_launch()
        return
    (out / f"{name}.json").write_text(json.dumps(jobs))
    command = launch("tests/training/elastic_worker.py", str(out / f"{name}.json"), ranks=processes)
    done = finished(command, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (out / f"{name}.txt").write_text(done.stdout)


def train_and_go_on(out: Path, changes: list[Change]) -> None:
    """Train the runs that are changed, then go on with a copy of each: one launch for each number of processes."""
    before = dict.fromkeys(change.before for change in changes)
    for processes in sorted({launched.processes for launched in before}):
        jobs = [job(out, one, run_folder(out, one)) for one in before if one.processes == processes]
        run_jobs(out, f"train-{processes}", jobs, processes)
    for processes in sorted({change.after.processes for change in changes}):
        mine = [change for change in changes if change.after.processes == processes]
        jobs = [job(out, change.after, interrupted(out, change)) for change in mine]
        run_jobs(out, f"go-on-{processes}", jobs, processes)


def interrupted(out: Path, change: Change) -> Path:
    """Return a copy of a run folder as a launch leaves it that was killed after the checkpoint of step 2."""
    run = run_folder(out, *change)
    shutil.copytree(run_folder(out, change.before), run)
    for folder in (f"checkpoints/step-{STEPS}", "adapter", "model"):
        shutil.rmtree(run / folder, ignore_errors=True)
    (run / "summary.json").unlink()
    return run


def samples(run: Path, processes: int) -> dict[str, list[int]]:
    """Return step -> the rows of all processes, in the global order of their micro batches."""
    found = [json.loads((run / f"samples-{number}.json").read_text()) for number in range(processes)]
    return {
        step: [
            row for together in zip(*(one[step] for one in found), strict=True) for micro in together for row in micro
        ]
        for step in found[0]
    }


def check_samples(out: Path, change: Change) -> None:
    """Check that every step has the samples of the uninterrupted run, none lost and none twice."""
    expected = samples(run_folder(out, change.before), change.before.processes)
    got = samples(run_folder(out, *change), change.after.processes)
    assert list(got) == [str(step) for step in range(SAVED, STEPS)]
    assert got == {step: expected[step] for step in got}
    assert all(len(rows) == GLOBAL_BATCH for rows in got.values())


def check_restored(out: Path, change: Change) -> None:
    """Check that weights and moments are those of the checkpoint, bit for bit."""
    assert json.loads((run_folder(out, *change) / "restored.json").read_text()) == [0.0]


def check_end(out: Path, change: Change) -> float:
    """Check the metrics to 1e-5 and the final weights and moments; return the largest relative difference of a loss."""
    whole, run = run_folder(out, change.before), run_folder(out, *change)
    for key in ("train/loss", "train/grad_norm", "validation/loss", "train/lr"):
        assert metrics(run, key) == pytest.approx(metrics(whole, key), rel=1e-5) and metrics(run, key), key
    files = [folder / "checkpoints" / f"step-{STEPS}" / "state.safetensors" for folder in (whole, run)]
    expected, got = (load_file(file) for file in files)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5, msg=name)
    before, after = metrics(whole, "train/loss"), metrics(run, "train/loss")
    return max(abs(after[step] / before[step] - 1) for step in after)
