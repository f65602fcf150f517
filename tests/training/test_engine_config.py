"""A DeepSpeed file and a recipe become one configuration: every number has one owner, every conflict a message."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from glora_llm.errors import UserError
from glora_llm.schema import TrainingSection
from glora_llm.training.deepspeed_config import (
    accumulation,
    deepspeed_config_files,
    offloads,
    read_deepspeed_config,
    resolve_deepspeed_config,
    zero_stage,
)

NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


def settings(**keys: Any) -> TrainingSection:
    return TrainingSection(**{"global_batch": 16, "micro_batch": 2, "steps": 10, "lr": 1e-3, **keys})


def leaves(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inside is None else list(itertools.chain.from_iterable(map(leaves, inside)))


@pytest.fixture
def config_file(tmp_path: Path) -> Any:
    def write(**content: Any) -> str:
        (tmp_path / "mine.json").write_text(json.dumps(content))
        return str(tmp_path / "mine.json")

    return write


def test_the_shipped_names() -> None:
    assert sorted(deepspeed_config_files()) == sorted(NAMES)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_file_resolves_for_every_world(name: str, world: int) -> None:
    assert "auto" in leaves(read_deepspeed_config(name))
    config = resolve_deepspeed_config(settings(deepspeed=name, max_grad_norm=0.7), torch.float32, world)
    assert "auto" not in leaves(config)
    assert config["train_batch_size"] == 16 and config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] * 2 * world == 16
    assert config["gradient_clipping"] == 0.7
    assert zero_stage(config) == int(name[4])
    assert offloads(config) == name.endswith("_offload")
    assert "auto" in leaves(read_deepspeed_config(name))  # the file is read afresh


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_takes_the_resolved_file(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    taken = DeepSpeedConfig(resolve_deepspeed_config(settings(deepspeed=name), torch.bfloat16, world=1))
    assert (taken.train_batch_size, taken.gradient_accumulation_steps) == (16, 8)
    assert taken.zero_config.stage == int(name[4])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_deepspeed_s_from_stage_1_on(name: str, dtype: torch.dtype) -> None:
    """Under stage 0 the adapters stay in float32 themselves, so DeepSpeed must not cast them."""
    config = resolve_deepspeed_config(settings(deepspeed=name), dtype, world=1)
    sharded = name != "zero0"
    assert config["bf16"]["enabled"] is (sharded and dtype == torch.bfloat16)
    assert config["fp16"]["enabled"] is (sharded and dtype == torch.float16)
    assert config["bf16"].get("check_grad_overflow", False) is config["bf16"]["enabled"]


def test_what_a_file_says_itself_stays(config_file: Any) -> None:
    path = config_file(
        bf16={"enabled": True, "check_grad_overflow": False}, train_batch_size=16, zero_optimization={"stage": 2}
    )
    config = resolve_deepspeed_config(settings(deepspeed=path), torch.float32, world=2)
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert config["fp16"] == {"enabled": False}
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (16, 4)


@pytest.mark.parametrize(
    ("key", "value", "owned"),
    [
        ("train_batch_size", 32, "16"),
        ("train_micro_batch_size_per_gpu", 4, "2"),
        ("gradient_accumulation_steps", 1, "4"),
        ("gradient_clipping", 0.5, "1.0"),
    ],
)
def test_a_fixed_number_that_contradicts_the_recipe(key: str, value: float, owned: str, config_file: Any) -> None:
    path = config_file(**{key: value})
    message = f"DeepSpeed configuration '{path}' sets {key} to {value}, the recipe to {owned}. Write \"auto\" there"
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_deepspeed_config(settings(deepspeed=path), torch.float32, world=2)


@pytest.mark.parametrize(("name", "hint"), [("zero4", "zero"), ("zero2_offlod", "zero2_offload"), ("zeroo3", "zero3")])
def test_an_unknown_name_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        read_deepspeed_config(name)
    assert f"No DeepSpeed configuration '{name}'; there is: " in str(caught.value)
    assert re.search(rf"Did you mean '{hint}\d?'\?", str(caught.value))
    assert all(known in str(caught.value) for known in NAMES)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No DeepSpeed configuration '.*absent\.json'; there is: .*or a \.json file"):
        read_deepspeed_config(str(tmp_path / "absent.json"))


def test_broken_json_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text('{"zero_optimization": {"stage": 2},\n "bf16": {"enabled": tru}}')
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} is not valid JSON: .*line 2 column"):
        read_deepspeed_config(str(file))


@pytest.mark.parametrize("text", ["[]", "3", '"zero2"'])
def test_json_that_is_no_object_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(UserError, match=r"list\.json"):
        resolve_deepspeed_config(settings(deepspeed=str(tmp_path / "list.json")), torch.float32, world=1)


def test_accumulation_by_hand() -> None:
    assert [accumulation(settings(), world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]


@pytest.mark.parametrize(("world", "fits"), [(3, (12, 18)), (5, (10, 20)), (16, (32,))])
def test_a_batch_that_does_not_divide_names_those_that_do(world: int, fits: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as caught:
        accumulation(settings(), world)
    message = str(caught.value)
    assert f"training.global_batch 16 = micro_batch 2 x accumulation x {world} ranks" in message
    assert f"Use global_batch {' or '.join(map(str, fits))}, or another micro_batch" in message
    assert all(accumulation(settings(global_batch=fit), world) >= 1 for fit in fits)
