"""lm-eval scores a run's adapter on its base as it scores the merged model, and both otherwise than the base.

`glora-llm evaluate --tasks` gives the scores of lm-eval's own command line.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from glora_llm.cli import main
from glora_llm.evaluation import lm_eval
from tests.merge.conftest import ALL_MODES, Train

TASKS: dict[str, dict[str, Any]] = {
    "tiny_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["yes", "no", "never"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of two tasks over a file; nothing is downloaded."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"text": f"Question {n}: is {n} a number that one can count to?"} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    return folder


@pytest.mark.slow
def test_unmerged_and_merged_score_alike(
    train: Train, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line that the page names, with GLoRA's adapter, merged, and the base alone."""
    trained = train(slots=ALL_MODES)
    merged, base = tmp_path / "merged", trained.plan.base.folder
    run = ["merge", str(trained.folder.path), "--out", str(merged), "--dtype", "float32", "--no-compare"]
    assert main(run) == 0

    def scores(models: str) -> dict[str, float]:
        out = tmp_path / "scores" / str(abs(hash(models)))
        arguments = ["--model", "hf", "--model_args", f"{models},dtype=float32", "--device", "cpu", "--batch_size", "1"]
        arguments += ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--output_path", str(out)]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        lm_eval.main()
        (file,) = out.rglob("results_*.json")
        found: dict[str, Any] = json.loads(file.read_text())["results"]
        return {
            "perplexity": found["tiny_text"]["byte_perplexity,none"],
            "accuracy": found["tiny_choice"]["acc,none"],
        }

    def ours(*more: str) -> dict[str, Any]:
        out = tmp_path / "ours.json"
        command = ["evaluate", *more, "--task-folder", str(tasks), "--tasks", ",".join(TASKS), "--out", str(out)]
        assert main([*command, "--batch", "1"]) == 0
        found: dict[str, Any] = json.loads(out.read_text())["tasks"]
        return {"perplexity": found["tiny_text"]["byte_perplexity"], "accuracy": found["tiny_choice"]["acc"]}

    adapted = scores(f"pretrained={base},peft={trained.folder.adapter}")
    by_command = scores(f"pretrained={merged}")
    assert by_command == pytest.approx(adapted, rel=1e-4)
    assert abs(scores(f"pretrained={base}")["perplexity"] - adapted["perplexity"]) > 0.01
    run_folder = str(trained.folder.path)
    assert ours(run_folder, "--merged", str(merged)) == by_command  # every bit
    assert ours(str(merged)) == by_command
    assert ours(run_folder) == pytest.approx(by_command, rel=1e-4)
