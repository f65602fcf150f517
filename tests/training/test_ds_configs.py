"""DeepSpeed's files: one for each stage, and no number in them that the recipe owns."""

import json
from pathlib import Path
from typing import Any

import pytest

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def test_there_is_one_for_each_stage() -> None:
    names = {file.stem for file in FILES}
    assert names == {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_recipe_owns_its_numbers(file: Path) -> None:
    values = read(file)
    assert [values[name] for name in OWNED] == ["auto"] * len(OWNED)
    assert values["bf16"] == values["fp16"] == {"enabled": "auto"}
    assert "optimizer" not in values and "scheduler" not in values


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_name_says_the_stage_and_the_offload(file: Path) -> None:
    zero = read(file)["zero_optimization"]
    assert zero["stage"] == int(file.stem[4])
    assert ("offload_optimizer" in zero) == file.stem.endswith("_offload")
    assert ("offload_param" in zero) == (file.stem == "zero3_offload")
