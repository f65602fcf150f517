"""Answers on two processes under ZeRO 3, with nothing left whole, are those of one process."""

import json
from pathlib import Path

import pytest

from glora_llm.run.generation import SAMPLES
from tests.in_process import alone, one_thread, train_in_process
from tests.run.test_generation import write_pairs
from tests.training.launching import ROOT, finished, launch

__all__ = ["alone", "one_thread"]
pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.reliability]


def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    words = [*write_pairs(tmp_path), "training.steps=4"]
    assert train_in_process("tiny_cpu", *words, f"output.dir={tmp_path / 'one'}") == 0
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # parameters this small are never split else
    stage3 = tmp_path / "zero3.json"
    stage3.write_text(json.dumps(config))
    more = [f"training.deepspeed={stage3}", f"output.dir={tmp_path / 'two'}", "evaluation.generate.batch=3"]
    done = finished(launch("train.py", "--recipe", "tiny_cpu", *words, *more))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    kept = [(tmp_path / run / SAMPLES).read_text() for run in ("one", "two")]
    assert kept[0] == kept[1] and len(kept[0].splitlines()) == 23
    scores = [json.loads((tmp_path / run / "summary.json").read_text())["test"] for run in ("one", "two")]
    assert scores[0]["test/number_match"] == scores[1]["test/number_match"]
