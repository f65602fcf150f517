"""Everything that can be known before a weight is loaded: combinations, what can be merged, and the dry run."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from glora_llm import recipe as recipes
from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig
from glora_llm.plan.checks import check_combination
from glora_llm.plan.mergeable import merge_obstacle
from glora_llm.plan.overview import describe
from glora_llm.plan.plan import Plan, make_plan
from glora_llm.run import train as run
from glora_llm.schema import Recipe
from glora_llm.tasks.text import TextTask
from glora_llm.training.deepspeed_config import resolve_deepspeed_config
from tests.plan.local_recipes import dry_run, local

RECIPES = Path(__file__).parents[2] / "recipes"
EVERY = sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml"))
NAMES = [name for name in EVERY if recipes.load(name).data.format != "images"]  # those are in test_plan_images.py
TINY = "model.name_or_path=embedded:tiny-llama"
FAMILIES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config
}  # fmt: skip
NEVER = {
    "llama": [],
    "mistral": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "qwen2": ["down_proj", "gate_proj", "o_proj", "up_proj"],
    "qwen3": ["down_proj", "gate_proj", "up_proj"],
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GLORA_CACHE", str(folder))
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield folder


def tiny(*overrides: str) -> Recipe:
    return recipes.load("tiny_cpu", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=int8", "training.deepspeed=zero3"],
         "model.quantization int8 and training.deepspeed zero3 (ZeRO 3) do not fit"),
        (["model.quantization=int8", "training.deepspeed=zero3_offload"], "training.deepspeed zero3_offload (ZeRO 3)"),
        (["data.test=null", "evaluation.test_before=true"], "evaluation.test_before needs test rows: set data.test"),
        (["data.validation=null", "evaluation.every=5"],
         "evaluation.every needs validation rows: set data.validation"),
        (["model.compile=true", "training.deepspeed=zero3"], "model.compile is set, and training.deepspeed zero3"),
        (["model.compile=true", "adapter.slots=null", "adapter.paths=sample"],
         "model.compile is set, and adapter.paths=sample draws another path at every micro step"),
        (["model.compile=true", "adapter.method=ia3", "adapter.slots=null"],
         "model.compile is set, and adapter.method ia3 is not among those that are compiled: glora, lora, rslora"),
        (["model.compile=true", "model.kernels=liger"], "model.compile is set, and model.kernels is liger"),
        (["training.deepspeed=zero5"], "No DeepSpeed configuration 'zero5'"),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_plan(tiny(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.quantization=int8", "training.deepspeed=zero2"],
        ["model.quantization=nf4", "training.deepspeed=zero3"],
        ["evaluation.test_before=true", "evaluation.every=5"],
        ["model.compile=true", "training.deepspeed=zero2", "model.gradient_checkpointing=true"],
        ["model.compile=true", "model.quantization=nf4", "adapter.method=lora", "adapter.slots=null"],
        ["data.test=null"],
    ],
)
def test_settings_that_go_together(overrides: list[str]) -> None:
    recipe = tiny(*overrides)
    check_combination(recipe, resolve_deepspeed_config(recipe.training, torch.float32, world_size=1).stage)


def text_of(plan: Plan) -> TextTask:
    assert isinstance(plan.task, TextTask)
    return plan.task


def adapted(family: str, **keys: Any) -> tuple[PretrainedConfig, torch.nn.Module]:
    config = FAMILIES[family](
        hidden_size=16, intermediate_size=24, vocab_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_config(config), GLoRAConfig(rank=2, **keys))
    return config, model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stops_a_merge(family: str) -> None:
    obstacle = merge_obstacle(*adapted(family))
    never = NEVER[family]
    if not never:
        assert obstacle is None
        return
    assert obstacle is not None
    assert f"slots C and E give a bias to {', '.join(never)}, and a {family} model" in obstacle
    assert "A and B merge everywhere" in obstacle


@pytest.mark.parametrize("family", FAMILIES)
def test_a_and_b_merge_everywhere(family: str) -> None:
    assert merge_obstacle(*adapted(family, slots={"A": "lora", "B": "lora"})) is None


@pytest.mark.parametrize("family", [family for family, never in NEVER.items() if never])
def test_the_advice_of_the_message_removes_the_obstacle(family: str) -> None:
    """C and E set to none by `paths` for the layers that it names, and only there."""
    paths = {f"{name}$": {"A": "lora", "B": "lora", "C": "none", "E": "none"} for name in NEVER[family]}
    assert merge_obstacle(*adapted(family, paths=paths)) is None
    left = {name: slots for name, slots in paths.items() if name != "up_proj$"}
    assert "give a bias to up_proj, and" in str(merge_obstacle(*adapted(family, paths=left)))


def test_a_bias_of_the_family_itself_is_no_obstacle() -> None:
    assert merge_obstacle(*adapted("qwen2", target_modules=["q_proj", "k_proj", "v_proj"])) is None


def test_an_adapter_on_the_output_head_has_an_answer_too() -> None:
    """No family's plain head has a bias, and the decoder's linears, which the families are asked for, lack it."""
    assert merge_obstacle(*adapted("llama", target_modules=["lm_head"], slots={"A": "lora"})) is None
    obstacle = merge_obstacle(*adapted("llama", target_modules=["q_proj", "lm_head"]))
    assert obstacle is not None and "give a bias to lm_head, and a llama model" in obstacle


def test_there_are_recipes() -> None:
    assert len(NAMES) >= 8
    formats = {"classification", "multiple_choice", "alpaca", "prompt_completion", "chat", "text"}
    assert {recipes.load(name).data.format for name in NAMES} == formats


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_dry_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = local(name, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    text, lines = dry_run(recipe, capsys)
    assert "(computed, not measured)" in lines["memory"]
    model = "a new llama" if recipe.model.config else "embedded:tiny-llama"
    assert lines["model"].startswith(f"{model}, {recipe.model.quantization}, ")
    assert ("vlora" in lines) == name.startswith("vlora")
    assert re.fullmatch(rf"{recipe.adapter.method}, \d+\.\d+ M trained \(\d+\.\d+ %\)", lines["adapter"])
    t = recipe.training
    identity = f"global batch {t.global_batch} = micro batch {t.micro_batch} x accumulation "
    assert lines["batch"].startswith(f"{identity}{t.global_batch // t.micro_batch} x processes 1; ")
    assert lines["deepspeed"].startswith(f"{t.deepspeed}; ")
    assert lines["merge"] == "possible into a plain transformers model"
    assert lines["compute"].startswith(("float32 on ", "bfloat16 on "))
    origin = "in safetensors files, whole" if recipe.model.config is None else "by the seed"
    assert lines["weights"].endswith("when training starts, once" if recipe.model.from_dense else origin)
    assert ("layers" in lines) == (not recipe.adapter.is_full)
    held_out = (recipe.data.validation is not None) + (recipe.data.test is not None)
    assert sum(line.startswith("data ") for line in text.splitlines()) == 1 + held_out
    assert {path.name for path in tmp_path.iterdir()} == before
    assert not torch.distributed.is_initialized()


def test_the_counts_of_a_dry_run(tmp_path: Path) -> None:
    """tiny-llama by hand: 2 layers of 7 linears; A and B of rank 4 (8 thin values a row and column), C and E."""
    text = describe(make_plan(local("tiny_cpu", tmp_path), world_size=2))
    linears = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]  # (O, I)
    trained = 2 * sum(4 * (i + i) + 4 * (o + i) + i + o for o, i in linears)
    frozen = 2 * (sum(o * i for o, i in linears) + 2 * 64) + 64 + 2 * 260 * 64
    assert f"{frozen / 1e6:.1f} M frozen" in text
    assert f"{trained / 1e6:.3f} M trained ({100 * trained / (trained + frozen):.2f} %)" in text
    assert f"; {3 * 16 * trained / 1e6:.0f} MB for 3 checkpoints (output.keep and one more)" in text
    assert (
        "global batch 16 = micro batch 4 x accumulation 2 x processes 2; 20 steps, 6.67 epochs" in text
    )  # 20 x 16 / 48


def test_epochs_become_steps(tmp_path: Path) -> None:
    plan = make_plan(local("tiny_cpu", tmp_path))
    assert len(plan.task.train) == 48 and plan.steps == 20  # 60 rows, 12 of them held out
    settings = plan.recipe.training.model_copy(update={"steps": None, "epochs": 2.5})
    assert make_plan(plan.recipe.model_copy(update={"training": settings})).steps == 8  # 120 / 16, rounded up


@pytest.mark.parametrize(("world", "parts"), [(1, 4), (2, 2), (4, 1)])
def test_the_identity_of_a_batch(world: int, parts: int, tmp_path: Path) -> None:
    expected = f"global batch 16 = micro batch 4 x accumulation {parts} x processes {world}"
    assert make_plan(local("tiny_cpu", tmp_path), world_size=world).batch_identity() == expected


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"Use global_batch 12 or 24, or another micro_batch"):
        make_plan(tiny(), world_size=3)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_rows_of_a_step(world: int, tmp_path: Path) -> None:
    plan = make_plan(local("tiny_cpu", tmp_path))
    train = text_of(plan).train
    for step in (0, 2, 3):  # 3: the second epoch begins
        targets = [
            sorted(batch["targets"].tolist())
            for rank in range(world)
            for batch in plan.process_batches(step, rank, world)
        ]
        rows = [train.row(index) for index in plan.sampler.step_rows(step)]
        assert len(rows) == 16 and len(targets) == 4
        expected = sorted(int(token) for row in rows for token in row.tokens[row.targets])
        assert sorted(itertools.chain.from_iterable(targets)) == expected


def test_a_dry_run_says_what_is_wrong(tmp_path: Path) -> None:
    recipe = local("tiny_cpu", tmp_path)
    wrong = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"targets": ["qq"]})})
    with pytest.raises(UserError, match="match no module"):
        run.train(wrong, dry_run=True)
    fixed = tmp_path / "fixed.json"
    fixed.write_text('{"train_batch_size": 99}')
    training = recipe.training.model_copy(update={"deepspeed": str(fixed)})
    with pytest.raises(UserError, match="sets train_batch_size to 99, the recipe to 16"):
        run.train(recipe.model_copy(update={"training": training}), dry_run=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("computes", "stage", "message"),
    [
        (False, "zero1", r"this \w+ does not compute in it\. Use model\.dtype=bfloat16 or float32"),
        (True, "zero0", r"zero0 \(ZeRO 0\) does not scale the loss.* Use training\.deepspeed=zero1"),
        (True, "zero1", None),
    ],
)
def test_float16_needs_a_device_and_a_loss_scale(
    computes: bool, stage: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: computes)
    recipe = local("tiny_cpu", tmp_path)
    model = recipe.model.model_copy(update={"dtype": "float16"})
    training = recipe.training.model_copy(update={"deepspeed": stage})
    plan = make_plan(recipe.model_copy(update={"model": model, "training": training}), world_size=1)
    if message is None:
        assert f"deepspeed  {stage}" in describe(plan)
        return
    with pytest.raises(UserError, match=message):
        describe(plan)


def test_only_answers_can_match_exactly(tmp_path: Path) -> None:
    plan: Plan = make_plan(local("tiny_cpu", tmp_path))
    task = text_of(plan)
    assert task.has_answers and task.data.label_sequences is not None
    data = plan.recipe.data.model_copy(update={"format": "text"})
    assert not dataclasses.replace(task, recipe=plan.recipe.model_copy(update={"data": data})).has_answers
    assert plan.rows("validation") is task.data.validation and plan.rows("test") is task.data.test
