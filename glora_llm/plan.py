"""What a recipe comes to before any weight is loaded: base model, tokenizer, data, targets, batch arithmetic.

Train, dry run, evaluate and merge all start from a `Plan`. Everything that a user may have got wrong is found here.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch

from glora_llm.adapter import adapted_layers, adapted_with_bias, inject, without_adapter
from glora_llm.data.sampler import GlobalSampler, permutation
from glora_llm.errors import UserError
from glora_llm.models import causal_lm
from glora_llm.models.bias import bias_support, bias_switch
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import AdapterSection, Recipe
from glora_llm.search.space import space_of
from glora_llm.tasks.images import image_task
from glora_llm.tasks.task import Batch, Rows, Task
from glora_llm.tasks.text import text_task
from glora_llm.training import checkpoint
from glora_llm.training.engine import accumulation, read_deepspeed_config, resolve_deepspeed_config, zero_stage
from glora_llm.vlora import allocated

CHOICE = 41  # stream of the seeded choice of scored rows


@dataclass(frozen=True)
class Plan:
    """A resolved recipe."""

    recipe: Recipe
    base: ResolvedModel
    task: Task
    sampler: GlobalSampler
    steps: int

    def batch(self, rows: Rows, indices: list[int]) -> Batch:
        """Return rows as the tensors of one forward pass."""
        return self.task.batch(rows, indices)

    def rank_batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """Return one rank's micro batches of one optimizer step."""
        micro = self.recipe.training.micro_batch
        parts = self.sampler.rank_rows(step, rank, world, micro)
        return [self.task.training_batch(rows, step, (n * world + rank) * micro) for n, rows in enumerate(parts)]

    def rows(self, split: str) -> Rows | None:
        """Return the rows of `validation` or `test`, or None where the recipe has none."""
        return self.task.validation if split == "validation" else self.task.test

    def choice(self, rows: Rows, limit: int | None) -> list[int]:
        """Return `limit` row numbers in a seeded order, or all; files are often sorted by class."""
        order = permutation(len(rows), self.recipe.training.seed, CHOICE)
        return [int(row) for row in order[:limit]]


def make_plan(recipe: Recipe, weights: bool = True) -> Plan:
    """Resolve everything that needs no weights and no process group; every rank may call this at once.

    Args:
        weights: False leaves the weights of a hub model where they are (a dry run).

    Raises:
        UserError: for anything in the recipe that cannot work.
    """
    check_combination(recipe)
    make_task = image_task if recipe.data.format == "images" else text_task
    base, task = make_task(recipe, weights)
    os.environ["HF_HUB_OFFLINE"] = "1"  # all is here now: an outage later cannot hurt
    training = recipe.training
    sampler = GlobalSampler(len(task.train), training.global_batch, training.seed)
    steps = training.steps or sampler.steps_for(training.epochs or 1)
    return Plan(recipe, base, task, sampler, steps)


def check_combination(recipe: Recipe) -> None:
    """Check settings that exclude each other.

    Raises:
        UserError: naming both, and what to change.
    """
    config = read_deepspeed_config(recipe.training.deepspeed)
    _check_origin(recipe)
    if zero_stage(config) == 3 and recipe.model.quantization == "int8":
        raise UserError(
            f"model.quantization int8 and training.deepspeed {recipe.training.deepspeed} (ZeRO 3) do not fit: "
            "DeepSpeed cannot shard int8 weights. Use nf4, or ZeRO 2."
        )
    if recipe.adapter.method == "adalora" and zero_stage(config) > 0:
        raise UserError(
            f"adapter.method adalora reads whole gradients after each step, which training.deepspeed "
            f"{recipe.training.deepspeed} does not keep. Use training.deepspeed=zero0."
        )
    if recipe.search is not None:
        check_search(recipe)
    elif recipe.merge.after_training and recipe.adapter.is_supernet:
        raise UserError(
            "merge.after_training merges the genome that a search chose, and this recipe trains a supernet without "
            "searching it: give it a `search` section (search={} has all defaults), or set merge.after_training=false."
        )
    if recipe.evaluation.test_before and recipe.data.test is None:
        raise UserError("evaluation.test_before needs test rows: set data.test.")
    if recipe.evaluation.every and recipe.data.validation is None:
        raise UserError("evaluation.every needs validation rows: set data.validation.")


def _check_origin(recipe: Recipe) -> None:
    """Check that model, adapter and vlora agree on what is trained."""
    model, method = recipe.model, recipe.adapter.method
    if model.config is not None and not recipe.adapter.is_full:
        raise UserError(
            f"model.config makes a model of random weights, and adapter.method {method} would leave them frozen. Set "
            "adapter.method=full; an adapter goes on the trained model: model.name_or_path=RUN/model."
        )
    if recipe.vlora is not None and not recipe.adapter.is_full:
        raise UserError(
            f"The section vlora shares the weights of a model that is trained as a whole, and adapter.method is "
            f"{method}. Set adapter.method=full, or take the section away (vlora=null)."
        )
    if recipe.vlora is not None and model.config is None:
        raise UserError(
            f"The section vlora is for a new model (model.config). To make {model.name_or_path} into VLoRA: "
            f"glora-llm vlora from-dense {model.name_or_path} --rank R --out DIR; then model.name_or_path=DIR, "
            "vlora=null."
        )
    if recipe.adapter.is_full and model.quantization != "none":
        raise UserError(
            f"adapter.method full trains the weights, which model.quantization {model.quantization} freezes. Set "
            "model.quantization=none."
        )


def check_search(recipe: Recipe) -> None:
    """Check that a recipe has what a search needs.

    Raises:
        UserError: when it is no supernet, or has no validation rows.
    """
    if not recipe.adapter.is_supernet:
        raise UserError(
            "A search needs a supernet, and this recipe trains fixed paths: set adapter.paths=sample and train, or "
            "take `search` away (search=null)."
        )
    if recipe.data.format == "images" and recipe.search and recipe.search.metric == "label_accuracy":
        raise UserError("search.metric label_accuracy is of label words; of images it is exact_match (their accuracy).")
    if recipe.data.validation is None:
        raise UserError("A search scores candidates on validation rows, never on test rows: set data.validation.")


def batch_identity(recipe: Recipe, world: int) -> str:
    """Return the arithmetic of a step in words.

    Raises:
        UserError: when the batch does not divide.
    """
    t = recipe.training
    parts = accumulation(t, world)
    return f"global batch {t.global_batch} = micro batch {t.micro_batch} x accumulation {parts} x ranks {world}"


def merge_obstacle(config: Any, model: Any) -> str | None:
    """Return why the adapter cannot be merged into its family, and what can be; None when it can."""
    names = adapted_with_bias(model)
    never = sorted({name.rpartition(".")[2] for name in names if _support(config, name) == "never"})
    if not never:
        return None
    return (
        f"This adapter cannot be merged: slots C and E give a bias to {', '.join(never)}, and a {config.model_type} "
        "model of plain transformers has none there. Training works; to merge, set C and E to none (for "
        f"'{never[0]}' alone: by adapter.paths); A and B merge everywhere. `merge --to lora` keeps C and E as the "
        "LoRA's bias."
    )


def _support(config: Any, name: str) -> str:
    suffix = name.rpartition(".")[2]
    if suffix == "lm_head":
        return "never"  # not part of the decoder layer that bias_support builds
    support = bias_support(config, suffix)
    return "never" if support == "switch" and bias_switch(config, suffix) is None else support


def describe(plan: Plan, world: int) -> str:
    """Return what a run would do, as text; builds the model without weights to count and to match targets.

    Raises:
        UserError: when targets match nothing, a slot or the merge asked for is impossible, or the DeepSpeed
            configuration contradicts the recipe.
    """
    recipe = plan.recipe
    dtype = causal_lm.compute_dtype(recipe.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    stage = zero_stage(resolve_deepspeed_config(recipe.training, dtype, world))
    if dtype == torch.float16:
        _check_float16(recipe.training.deepspeed, stage)
    _check_masters(recipe, dtype, stage)
    empty = causal_lm.meta_model(recipe.model, plan.base.folder)
    model = inject(empty, _without_start(recipe.adapter), recipe.training.seed, plan.steps)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    saved = checkpoint.size(trained, has_adapter=not recipe.adapter.is_full)
    if recipe.search is not None:
        measured = recipe.search.limit != "parameters"  # what that costs is not known yet
        space_of(adapted_layers(model), recipe.search, (lambda *_: 0.0) if measured else None)
    obstacle = merge_obstacle(without_adapter(model).config, model)
    if obstacle and recipe.merge.after_training:
        raise UserError(f"merge.after_training: {obstacle}")
    lines = [
        f"model      {plan.base.name}, {recipe.model.quantization}, {(total - trained) / 1e6:.1f} M frozen",
        f"adapter    {recipe.adapter.method}, {trained / 1e6:.3f} M trained ({100 * trained / total:.2f} %)",
        *_describe_sharing(model),
        *[f"data       {report.describe()}" for report in plan.task.reports.values()],
        f"batch      {batch_identity(recipe, world)}; {plan.steps} steps, "
        f"{plan.steps / plan.sampler.steps_per_epoch:.2f} epochs",
        f"deepspeed  {recipe.training.deepspeed}; {2 * saved / 1e6:.0f} MB for two checkpoints",
        f"merge      {obstacle or 'possible into a plain transformers model'}",
    ]
    return "\n".join(lines)


def _check_float16(deepspeed: str, stage: int) -> None:
    """Check that the device computes in float16, and that the ZeRO stage scales the loss."""
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise UserError(
            f"model.dtype is float16, and this {get_accelerator().device_name()} does not compute in it. Use "
            "model.dtype=bfloat16 or float32."
        )
    if stage == 0:
        raise UserError(
            f"model.dtype is float16, and training.deepspeed {deepspeed} (ZeRO 0) does not scale the loss: small "
            "gradients would become zero. Use training.deepspeed=zero1, or model.dtype=float32."
        )


def _check_masters(recipe: Recipe, dtype: torch.dtype, stage: int) -> None:
    """Check that a model trained as a whole has float32 masters: stage 0 keeps none beside bfloat16 weights."""
    if recipe.adapter.is_full and dtype != torch.float32 and stage == 0:
        short = str(dtype).removeprefix("torch.")
        raise UserError(
            f"adapter.method full in {short} needs float32 masters, which training.deepspeed "
            f"{recipe.training.deepspeed} (ZeRO 0) does not keep: steps would be lost to rounding. Use zero1, or "
            "model.dtype=float32."
        )


def _describe_sharing(model: Any) -> list[str]:
    count = allocated(model)
    if not count.dense:
        return []
    return [
        f"vlora      {count.total / 1e6:.3f} M of {count.dense / 1e6:.3f} M in the shared linears "
        f"({100 * count.share:.1f} %): bases {count.base / 1e6:.3f} M, increments {count.increments / 1e6:.3f} M"
    ]


def _without_start(section: AdapterSection) -> AdapterSection:
    """Leave out a start that PEFT computes from the weights (PiSSA, OLoRA): a model without weights has none."""
    rest = {name: value for name, value in (section.peft or {}).items() if name != "init_lora_weights"}
    return section.model_copy(update={"peft": rest or None})
