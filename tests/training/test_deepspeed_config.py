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
from glora_llm.training import deepspeed_config
from glora_llm.training.deepspeed_config import accumulation, deepspeed_config_files, resolve_deepspeed_config

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
    config = resolve_deepspeed_config(settings(deepspeed=name, max_grad_norm=0.7), torch.float32, world)
    values = config.values
    assert "auto" in leaves(json.loads(deepspeed_config_files()[name].read_text())) and "auto" not in leaves(values)
    assert values["train_batch_size"] == 16 and values["train_micro_batch_size_per_gpu"] == 2
    assert values["gradient_accumulation_steps"] * 2 * world == config.accumulation * 2 * world == 16
    assert values["gradient_clipping"] == 0.7
    assert (config.name, config.stage, config.offloads) == (name, int(name[4]), name.endswith("_offload"))


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_takes_the_resolved_file(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    taken = DeepSpeedConfig(resolve_deepspeed_config(settings(deepspeed=name), torch.bfloat16, 1).values)
    assert (taken.train_batch_size, taken.gradient_accumulation_steps) == (16, 8)
    assert taken.zero_config.stage == int(name[4])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_deepspeed_s_from_stage_1_on(name: str, dtype: torch.dtype) -> None:
    """Under stage 0 the adapters stay in float32 themselves, so DeepSpeed must not cast them."""
    config = resolve_deepspeed_config(settings(deepspeed=name), dtype, 1).values
    sharded = name != "zero0"
    assert config["bf16"]["enabled"] is (sharded and dtype == torch.bfloat16)
    assert config["fp16"]["enabled"] is (sharded and dtype == torch.float16)
    assert config["bf16"].get("check_grad_overflow", False) is config["bf16"]["enabled"]


def test_what_a_file_says_itself_stays(config_file: Any) -> None:
    path = config_file(
        bf16={"enabled": True, "check_grad_overflow": False}, train_batch_size=16, zero_optimization={"stage": 2}
    )
    config = resolve_deepspeed_config(settings(deepspeed=path), torch.bfloat16, 2).values
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert config["fp16"] == {"enabled": False}
    with pytest.raises(UserError, match=r"sets bf16.enabled to true, and the recipe computes in float32"):
        resolve_deepspeed_config(settings(deepspeed=path), torch.float32, 2)
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
        resolve_deepspeed_config(settings(deepspeed=path), torch.float32, 2)


@pytest.mark.parametrize(("name", "hint"), [("zero4", "zero"), ("zero2_offlod", "zero2_offload"), ("zeroo3", "zero3")])
def test_an_unknown_name_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_deepspeed_config(settings(deepspeed=name), torch.float32, 1)
    assert f"No DeepSpeed configuration '{name}'; there is: " in str(caught.value)
    assert re.search(rf"Did you mean '{hint}\d?'\?", str(caught.value))
    assert all(known in str(caught.value) for known in NAMES)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No DeepSpeed configuration '.*absent\.json'; there is: .*or a \.json file"):
        resolve_deepspeed_config(settings(deepspeed=str(tmp_path / "absent.json")), torch.float32, 1)


def test_broken_json_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text('{"zero_optimization": {"stage": 2},\n "bf16": {"enabled": tru}}')
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} is not valid JSON: .*line 2 column"):
        resolve_deepspeed_config(settings(deepspeed=str(file)), torch.float32, 1)


@pytest.mark.parametrize("text", ["[]", "3", '"zero2"'])
def test_json_that_is_no_object_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(UserError, match=r"list\.json"):
        resolve_deepspeed_config(settings(deepspeed=str(tmp_path / "list.json")), torch.float32, 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage: "),
        ({"zero_optimization": {"stage": 9}}, "zero_optimization.stage: "),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true; there are 0, 1, 2 and 3."),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto"; there are 0, 1, 2 and 3.'),
        ({"zero_optimization": {"stagee": 2}}, "zero_optimization.stagee: there is no such key. Did you mean 'stage'?"),
        ({"zero_optimization": [2]}, "zero_optimization is [2], and must be an object"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": ["cpu"]}}, "zero_optimization.offload_optimizer: "),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, "nvme"),
        ({"zero_optimisation": {"stage": 3}}, "'zero_optimisation' is no section that is known here"),
        ({"zero_optimisation": {"stage": 3}}, "Did you mean 'zero_optimization'?"),
        ({"bf16": True}, "bf16 is true, and must be an object"),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled is "yes"; use true, false or "auto".'),
        (
            {"fp16": {"enabled": True, "loss_scal": 0}},
            "fp16.loss_scal: there is no such key. Did you mean 'loss_scale'?",
        ),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"data_types": {"grad_accum_dtype": "float"}}, "data_types.grad_accum_dtype must be fp32, bf16 or fp16"),
        ({"optimizer": {"type": "Adam"}}, "the recipe owns the optimizer (training.optimizer, lr, betas, eps)"),
        ({"scheduler": {"type": "WarmupLR"}}, "the recipe owns the scheduler (training.schedule and training.warmup)"),
    ],
)
def test_a_wrong_file_is_one_message(content: dict[str, Any], said: str, config_file: Any) -> None:
    path = config_file(**content)
    with pytest.raises(UserError) as caught:
        resolve_deepspeed_config(settings(deepspeed=path), torch.float32, 1)
    assert str(caught.value).startswith((path, "DeepSpeed configuration")) and said in str(caught.value)


def test_a_file_may_fix_the_accumulation_of_a_launch_that_a_merge_does_not_know(config_file: Any) -> None:
    path = config_file(gradient_accumulation_steps=4)
    assert resolve_deepspeed_config(settings(deepspeed=path), torch.float32, 2).accumulation == 4
    assert resolve_deepspeed_config(settings(deepspeed=path), torch.float32, None).accumulation == 4
    with pytest.raises(UserError, match="sets gradient_accumulation_steps to 4, the recipe to 8"):
        resolve_deepspeed_config(settings(deepspeed=path), torch.float32, 1)


def test_a_null_offload_is_none(config_file: Any) -> None:
    path = config_file(zero_optimization={"stage": 2, "offload_optimizer": None})
    assert not resolve_deepspeed_config(settings(deepspeed=path), torch.float32, 1).offloads


@pytest.mark.parametrize("name", NAMES)
def test_gradients_accumulate_in_float32_where_that_works(name: str) -> None:
    values = resolve_deepspeed_config(settings(deepspeed=name), torch.bfloat16, 1).values
    assert values.get("data_types") == ({"grad_accum_dtype": "fp32"} if int(name[4]) > 1 else None)


@pytest.mark.parametrize(
    ("stage", "dtype", "works"), [(1, "bfloat16", False), (1, "float32", True), (2, "bfloat16", True)]
)
def test_float32_accumulation_is_refused_where_the_run_would_die(
    stage: int, dtype: str, works: bool, config_file: Any
) -> None:
    path = config_file(zero_optimization={"stage": stage}, data_types={"grad_accum_dtype": "fp32"})
    if works:
        resolve_deepspeed_config(settings(deepspeed=path), getattr(torch, dtype), 1)
        return
    with pytest.raises(UserError, match=r"accumulates gradients in float32 .* under ZeRO 1 in bfloat16.* Use zero2"):
        resolve_deepspeed_config(settings(deepspeed=path), getattr(torch, dtype), 1)


@pytest.mark.parametrize("version", ["0.18.2", "0.19.7", "0.19.8+cu130", "0.20.0rc1", "1.0"])
def test_an_older_deepspeed_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glora_llm.training.deepspeed_config.metadata.version", lambda _name: version)
    if version not in ("0.18.2", "0.19.7"):
        resolve_deepspeed_config(settings(), torch.float32, 1)
        return
    with pytest.raises(UserError, match=rf"DeepSpeed {version} is installed.*pip install 'deepspeed>=0\.19\.8'"):
        resolve_deepspeed_config(settings(), torch.float32, 1)


def test_the_package_asks_for_the_same_version() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"deepspeed>={".".join(map(str, deepspeed_config.OLDEST))}"' in text


def test_accumulation_by_hand() -> None:
    assert [accumulation(settings(), world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]


@pytest.mark.parametrize(("world", "fits"), [(3, (12, 18)), (5, (10, 20)), (16, (32,))])
def test_a_batch_that_does_not_divide_names_those_that_do(world: int, fits: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as caught:
        accumulation(settings(), world)
    message = str(caught.value)
    assert f"training.global_batch 16 = micro_batch 2 x accumulation x {world} processes" in message
    assert f"Use global_batch {' or '.join(map(str, fits))}, or another micro_batch" in message
    assert all(accumulation(settings(global_batch=fit), world) >= 1 for fit in fits)
