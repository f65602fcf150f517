"""A run that is told to end while it scores its validation records: saved there, and the next launch scores them."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from glora_llm.training.batch import Batch
from glora_llm.training.engine import Engine
from tests.in_process import alone, one_thread, train_in_process

__all__ = ["alone", "one_thread"]
SETTINGS = [
    "training.steps=2", "training.global_batch=4", "training.micro_batch=2", "data.max_rows=40", "data.max_test_rows=4",
    "evaluation.every=1", "output.save_every=100",
]  # fmt: skip


def lines(run: Path) -> list[tuple[int, str, float]]:
    """Return (step, metric, value) of what does not depend on time, in the order of the file."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (entry["step"], name, value)
        for entry in entries
        for name, value in entry.items()
        if name in ("train/loss", "validation/loss")
    ]


def test_the_next_launch_validates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, told = (["tiny_cpu", *SETTINGS, f"output.dir={tmp_path / name}"] for name in ("whole", "told"))
    assert train_in_process(*whole) == 0
    score = Engine.score

    def told_while_scoring(engine: Engine, batch: Batch) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return score(engine, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "score", told_while_scoring)
        assert train_in_process(*told) == 75
        assert "told to end (SIGUSR1) after step 1 of 2. This goes on:" in capfd.readouterr().out
        assert [path.name for path in (tmp_path / "told" / "checkpoints").iterdir()] == ["step-1"]
    assert train_in_process(*told) == 0
    assert lines(tmp_path / "told") == lines(tmp_path / "whole")
