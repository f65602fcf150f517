"""What `glora-llm plan` says: counts by hand, parts that add up, batches of the data, changes that fit."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from glora_llm import recipe as recipes
from glora_llm.adapters.inject import inject
from glora_llm.models.load import meta_model
from glora_llm.models.random_llama import LLAMA2_7B, SMALL, llama_config
from glora_llm.models.resolve import ResolvedModel
from glora_llm.plan.batches import largest_micro_batch, largest_scored_batch
from glora_llm.plan.forecast import Machine, forecast
from glora_llm.plan.memory import compute_memory
from glora_llm.plan.plan import make_plan
from glora_llm.plan.step_memory import StepShape, measured_parts, step_parts
from glora_llm.plan.trained_counts import trained_counts
from glora_llm.schema import AdapterSection, ModelSection

CPU, ONE_GPU = Machine(True, 1, None, None), Machine(False, 1, None, None)


def test_trained_parameters_by_slot_kind_and_layer(tiny: ResolvedModel) -> None:
    """By hand, q_proj of 64 x 64 with rank 4: A and B (64 + 64) x 4 each, C and E 64 each."""
    recipe = recipes.load("tiny_cpu")
    counts = trained_counts(inject(meta_model(recipe.model, tiny.folder), recipe.adapter, seed=0, steps=1))
    assert counts.by_kind["q_proj"] == 2 * (2 * 128 * 4 + 64 + 64)
    assert list(counts.by_slot) == ["A", "B", "C", "E"] and list(counts.by_layer) == ["0", "1"]
    assert sum(counts.by_slot.values()) == sum(counts.by_layer.values()) == counts.total == 18_432


def test_lora_and_whole_models_are_counted_too(tiny: ResolvedModel) -> None:
    lora = recipes.load("tiny_cpu", ["adapter.method=lora", "adapter.slots=null"])
    counts = trained_counts(inject(meta_model(lora.model, tiny.folder), lora.adapter, seed=0, steps=1))
    assert set(counts.by_slot) == {"lora_A", "lora_B"} and counts.by_kind["q_proj"] == 2 * 128 * 4
    model = meta_model(lora.model, tiny.folder)
    whole = trained_counts(inject(model, AdapterSection(method="full"), seed=0, steps=1))
    assert set(whole.by_slot) == {"weights"} and set(whole.by_layer) == {"0", "1", "other"}
    assert whole.total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("purpose", ["training", "scoring"])
def test_the_parts_of_a_step_are_its_peak(tmp_path: Path, purpose: str) -> None:
    """A wide vocabulary: the logits of 4 x 256 tokens are part of the peak, and scoring keeps no activations."""
    llama_config(dataclasses.replace(SMALL, vocabulary=8192)).save_pretrained(tmp_path)
    section = ModelSection(name_or_path="none", dtype="float32")
    shape = StepShape(section, tmp_path, AdapterSection(), 4, 256, torch.float32, purpose=purpose)  # type: ignore[arg-type]
    whole, few = measured_parts(shape, 8), step_parts(shape)
    assert few == whole and whole.total == whole.activations + whole.logits + whole.workspace
    assert whole.logits >= 4 * 256 * 8192 * 4
    assert (whole.activations > 20e6) is (purpose == "training")


def test_the_largest_batches_are_those_of_the_data(tiny: ResolvedModel) -> None:
    plan = make_plan(recipes.load("tiny_cpu"), weights=False, world_size=1)
    batches = [batch for step in range(plan.steps) for batch in plan.process_batches(step, 0, 1)]
    tokens = [batch["input_ids"].numel() for batch in batches]
    assert largest_micro_batch(plan)["input_ids"].numel() == max(tokens) > min(tokens)
    longest = max(int(rows.lengths().max()) for rows in (plan.task.validation, plan.task.test) if rows)
    assert largest_scored_batch(plan)["input_ids"].shape[1] <= longest


def test_phases_follow_from_the_recipe(tiny: ResolvedModel) -> None:
    """A supernet that is searched; on a CPU resident memory, on a GPU buffers that are never written count too."""
    recipe = recipes.load("tiny_cpu_search")
    plan = make_plan(recipe, weights=False, world_size=1)
    cpu, gpu = (forecast(recipe, plan.base.folder, machine, plan) for machine in (CPU, ONE_GPU))
    names = ["loading", "at rest", "training", "evaluating", "saving", "searching", "merging"]
    assert [phase.name for phase in cpu.phases] == [phase.name for phase in gpu.phases] == names
    at = {phase.name: phase for phase in gpu.phases}
    assert at["training"].parts["buffers"] == 4 * 2 * 50_000_000
    assert at["at rest"].total < at["evaluating"].total < at["training"].total
    assert at["saving"].host > 0 and cpu.phases[2].parts["libraries"] > 0
    assert "libraries" not in at["training"].parts
    assert cpu.disk["one checkpoint"] == 16 * cpu.counts.total


def test_what_does_not_fit_is_told_with_changes_that_do(tiny: ResolvedModel) -> None:
    recipe = recipes.load("tiny_cpu", ["data.max_tokens=512", "training.micro_batch=8", "evaluation.batch=4"])
    need = forecast(recipe, tiny.folder, ONE_GPU, None).peak.total
    assert need == compute_memory(recipe, tiny.folder, 1, torch.float32).training
    room = dataclasses.replace(ONE_GPU, memory=need + 10**9)
    assert forecast(recipe, tiny.folder, room, None).changes == {}
    found = forecast(recipe, tiny.folder, dataclasses.replace(room, memory=need + 10**9 - 1), None)
    assert found.fits is False and "training.micro_batch=4" in found.changes and "adapter.rank=2" in found.changes
    for text, size in found.changes.items():
        more = ["data.max_tokens=512", "training.micro_batch=8", "evaluation.batch=4", *text.split()]
        assert forecast(recipes.load("tiny_cpu", more), tiny.folder, room, None).peak.total == size < need


def test_a_7b_shape_is_planned_from_its_configuration_alone(tmp_path: Path) -> None:
    """And within a minute beside other work; alone on two cores it takes seconds (docs/plan.md)."""
    llama_config(LLAMA2_7B).save_pretrained(tmp_path)
    began = time.perf_counter()
    machine = Machine(False, 1, 24 * 10**9, "NVIDIA GeForce RTX 4090")
    found = forecast(
        recipes.load("llama2_glora", ["training.steps=100", "training.epochs=null"]), tmp_path, machine, None
    )
    assert time.perf_counter() - began < 60
    assert found.peak.name == "training" and found.peak.total == pytest.approx(6.8e9, rel=0.01) and found.fits
    assert found.counts.total == 40_706_048 and found.frozen == 6_738_415_616
    assert found.time.peak_flops == 165e12 and found.time.steps == 100
    assert found.time.least_seconds == pytest.approx(100 * found.time.step_flops / 165e12)


def test_on_a_cpu_files_stay_mapped(tiny: ResolvedModel) -> None:
    """By hand: dense float32 weights are those of the file; in nf4 the file is there beside the packed values."""
    file = (tiny.folder / "model.safetensors").stat().st_size
    bases = {}
    for quantization in ("none", "nf4"):
        recipe = recipes.load("tiny_cpu", [f"model.quantization={quantization}"])
        phases = {phase.name: phase.parts for phase in forecast(recipe, tiny.folder, CPU, None).phases}
        bases[quantization] = phases["loading"]["base"], phases["training"]["base"]
    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert bases["none"] == (0, file)
    assert bases["nf4"][1] == file + linears // 2
    assert bases["nf4"][0] == pytest.approx(linears * 4 + linears // 2, rel=0.05)
