"""The recipes of tasks run: on the tiny model, on records that lie here, for two steps."""

import json
from pathlib import Path

import pytest

from glora_llm.run.train import train
from tests.in_process import alone, forget_launch, one_thread
from tests.plan.local_recipes import local

__all__ = ["alone", "one_thread"]


@pytest.mark.parametrize(
    ("name", "score"), [("smollm2_gsm8k", "number_match"), ("smollm2_lora_multiple_choice", "accuracy_norm")]
)
def test_a_small_twin_runs(name: str, score: str, tmp_path: Path) -> None:
    recipe = local(name, tmp_path)
    training = recipe.training.model_copy(update={"steps": 2, "warmup": 0.0})
    generate = recipe.evaluation.generate and recipe.evaluation.generate.model_copy(update={"max_new_tokens": 8})
    evaluation = recipe.evaluation.model_copy(update={"generate": generate})
    try:
        train(recipe.model_copy(update={"training": training, "evaluation": evaluation}))
    finally:
        forget_launch()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {f"test/{score}", "test/loss"} <= set(summary["test"])
    assert f"test/{score}" in summary["test_before"]
