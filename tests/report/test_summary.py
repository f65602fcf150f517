"""The table that a run ends with."""

import json
from pathlib import Path

import pytest

from glora_llm import recipe
from glora_llm.plan.run_folder import RunFolder
from glora_llm.report.summary import print_summary

SUMMARY = {
    "steps": 20, "trained_parameters": 1234, "seconds": 90.0, "peak_memory_gb": 1.5, "skipped_steps": 0,
    "validation": {"validation/loss": 0.5, "validation/exact_match": 0.75},
}  # fmt: skip


def printed(folder: Path, capsys: pytest.CaptureFixture[str], **values: object) -> str:
    folder.joinpath("recipe.yaml").write_text(recipe.dump(recipe.load("tiny_cpu")))
    folder.joinpath("summary.json").write_text(json.dumps(SUMMARY | values))
    print_summary(RunFolder(folder))
    return capsys.readouterr().out


def test_a_run_without_test_rows_ends_with_its_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(tmp_path, capsys)
    assert "validation" in text and "0.7500" in text and "test after" not in text and "warning" not in text


def test_all_scores_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(tmp_path, capsys, test_before={"test/loss": 9.0}, test={"test/loss": 0.25, "test/exact_match": 0.5})
    heads, *_ = (line for line in text.splitlines() if "score" in line and "validation" in line)
    assert heads.index("validation") < heads.index("test before") < heads.index("test after")
    loss = next(line for line in text.splitlines() if "loss" in line)
    assert loss.index("0.5000") < loss.index("9.0000") < loss.index("0.2500")


def test_skipped_steps_are_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "warning: 3 of 20 steps were skipped" in printed(tmp_path, capsys, skipped_steps=3)


def test_the_computed_peak_stands_beside_the_measured_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "1.50 GB on the first process (1.44 GB computed)" in printed(tmp_path, capsys, predicted_peak_gb=1.44)
    assert "GB computed" not in printed(tmp_path, capsys, predicted_peak_gb=None)
