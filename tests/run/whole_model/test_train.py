"""A whole model is trained: what is left, resuming, what is counted and logged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glora_llm import recipe as recipes
from glora_llm.adapters.weights import trainables
from glora_llm.evaluation.trained import load_adapted
from glora_llm.plan.overview import describe
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.training.optim import parameter_groups
from glora_llm.vlora import VLoRALinear, increments, vlora_layers
from tests.run.whole_model.conftest import overrides, train
from tests.training.launching import metrics


def state(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "state.safetensors")


def test_what_a_run_leaves(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml", "base.json", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "model",
        "sample.json", "launches.jsonl",
    }  # fmt: skip
    assert {path.name for path in (run / "checkpoints" / "step-5").iterdir()} == {
        "state.safetensors", "trainer.json", "manifest.json"
    }  # fmt: skip
    assert {path.name for path in (run / "model").iterdir()} == {
        "config.json", "model.safetensors", "vlora.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    masters = {name.removeprefix("master/"): t for name, t in state(run, 5).items() if name.startswith("master/")}
    model = load_file(run / "model" / "model.safetensors")
    assert model.keys() == masters.keys() and all(torch.equal(model[name], masters[name]) for name in model)
    assert {t.dtype for t in model.values()} == {torch.float32}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["trained_parameters"] == sum(t.numel() for t in model.values())
    assert summary["skipped_steps"] == 0


def test_everything_learns(run: Path) -> None:
    """Every parameter moves, and the loss goes down from that of a uniform guess."""
    first, last = state(run, 1), state(run, 5)
    still = [name for name in first if name.startswith("master/") and torch.equal(first[name], last[name])]
    assert not still
    losses = metrics(run, "train/loss")
    assert losses[1] == pytest.approx(torch.log(torch.tensor(400.0)).item(), abs=0.1) and losses[5] < losses[1] - 0.2


@pytest.mark.parametrize("start", [3])
def test_three_and_two_steps_are_five(run: Path, start: int, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for step in range(start + 1, 6):
        shutil.rmtree(again / "checkpoints" / f"step-{step}")
    shutil.rmtree(again / "model")
    assert train(again) == 0
    got, expected = state(again, 5), state(run, 5)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    assert (again / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert metrics(again, "train/loss") == metrics(run, "train/loss")


@pytest.mark.parametrize("deepspeed", ["zero0", "zero1", "zero3", "zero2_offload", "zero3_offload"])
def test_every_stage_trains_alike(run: Path, deepspeed: str, tmp_path: Path) -> None:
    assert train(tmp_path / "run", f"training.deepspeed={deepspeed}", "model.gradient_checkpointing=true") == 0
    assert metrics(tmp_path / "run", "train/loss") == pytest.approx(metrics(run, "train/loss"), rel=1e-5)
    got, expected = state(tmp_path / "run", 5), state(run, 5)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=2e-5, msg=name)


def test_increments_are_logged_by_layer_and_step(run: Path) -> None:
    model = load_adapted(make_plan(RunFolder(run).recipe()), run / "model")
    for layer in (1, 3):
        logged = metrics(run, f"vlora/increment/layer_{layer:02d}")
        assert list(logged) == [1, 2, 3, 4, 5] and 0 < logged[1] < logged[5]
        sizes = [size.norm for name, size in increments(model).items() if f"layers.{layer}." in name]
        assert len(sizes) == 7 and logged[5] == pytest.approx(sum(size**2 for size in sizes) ** 0.5, rel=1e-5)
    assert not metrics(run, "vlora/increment/layer_00"), "a base adds nothing"


def test_weight_decay_is_for_matrices_and_a_base_counts_once(run: Path) -> None:
    plan = make_plan(RunFolder(run).recipe())
    model = load_adapted(plan, run / "model").requires_grad_(True)
    items = trainables(model, plan.recipe.adapter, 1.0)
    groups = parameter_groups(items, 0.1)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    plain = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert {name for name in decayed | plain if "norm" in name} == plain
    assert len([name for name in decayed if name.endswith("q_proj.weight")]) == 2  # four layers, two compounds
    assert len({id(item.parameter) for item in items}) == len(items)
    assert "lm_head.weight" not in decayed | plain, "it is the embedding"


def test_the_dry_run_counts(tmp_path: Path) -> None:
    recipe = recipes.load("vlora_lm_tiny", overrides(tmp_path / "run"))
    text = describe(make_plan(recipe, world_size=2))
    dense = 4 * (4 * 32 * 32 + 3 * 32 * 48)
    shared = dense // 2 + 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
    total = shared + 400 * 32 + 9 * 32
    assert f"vlora      {shared / 1e6:.3f} M of {dense / 1e6:.3f} M in the shared linears" in text
    assert f"adapter    full, {total / 1e6:.3f} M trained (100.00 %)" in text
    assert "100.0% full" in text or "99." in text


def test_a_dense_twin_trains_too(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "vlora=null") == 0
    assert not (tmp_path / "run" / "model" / "vlora.json").exists()
    model = load_adapted(make_plan(RunFolder(tmp_path / "run").recipe()), tmp_path / "run" / "model")
    assert not vlora_layers(model) and not any(isinstance(module, VLoRALinear) for module in model.modules())
    assert not any(name.startswith("vlora/") for name in json.loads((tmp_path / "run/metrics.jsonl").open().readline()))
