"""Gradients by the base's weights as thin sketches, of some of the training samples: what predictors read.

At the base's weights, with an adapter that changes nothing; or along a short run, whose adapter is trained as the run's
will be, on the samples of the run's first steps, and is then thrown away. Both under the run's own DeepSpeed
configuration, so that they fit where the run fits. Sums are over all processes.
"""

import gc
from functools import partial
from typing import NamedTuple

import torch
from torch import distributed as dist

from glora_llm.adapters.even import even_scales, factor, set_scales, sizes_of
from glora_llm.adapters.inject import adapted_layers, inject, without_adapter
from glora_llm.adapters.weights import trainables
from glora_llm.data.sampler import permutation
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.learning_rates import DEFAULT_LR_FACTORS
from glora_llm.glora.path import Genome
from glora_llm.glora.sketch import Directions, Probe, Reads, Sketch
from glora_llm.launch.ranks import Processes
from glora_llm.models import load
from glora_llm.plan.plan import Plan
from glora_llm.run.build import shards_of
from glora_llm.schema import AdapterSection
from glora_llm.search.budget import rows_of, short_steps, structure_choices
from glora_llm.search.predictors import OF_HALVES, OF_NOISE, Gradients, LayerGradients
from glora_llm.training.engine import Engine
from glora_llm.training.loop import NonFinite, seed_micro_step
from glora_llm.vlora.partitioned import whole

ROWS_STREAM = 43  # of the seeded choice of the samples


class Measured(NamedTuple):
    """Gradients of some samples, and how they were taken.

    Args:
        layers: the gradients of each layer.
        samples: that were looked at.
        losses: of the steps of a short run, nats/token; empty where there was none.
    """

    layers: dict[str, LayerGradients]
    samples: int
    losses: list[float]


def rows_seen(plan: Plan) -> list[int]:
    """Return the numbers of the samples that are looked at, in a seeded order."""
    training = plan.recipe.training
    order = permutation(len(plan.task.train), training.seed, ROWS_STREAM)
    return [int(row) for row in order[: rows_of(plan.recipe.adapter, plan.steps * training.global_batch)]]


def meta_layers(plan: Plan) -> dict[str, GLoRALinear]:
    """Return the adapted layers of the model without weights."""
    bare = load.meta_model(plan.recipe.model, plan.base.folder)
    return adapted_layers(inject(bare, _silent(plan.recipe.adapter), plan.recipe.training.seed, plan.steps))


def _silent(section: AdapterSection) -> AdapterSection:
    """Return an adapter on the same targets that costs nearly nothing and is never trained."""
    changes = {"budget": None, "slots": {"E": "vector"}, "dropout": 0.0, "scaling": "alpha", "lr_factors": None}
    return section.model_copy(update=changes)


def measured(plan: Plan, processes: Processes, short: Genome | None) -> Measured:
    """Return the gradients of each layer, of the samples of all processes.

    Args:
        short: the structure of the short run along which they are taken; None: at the base's weights.

    Raises:
        NonFinite: for a short run that diverges, as of any run: a comparison goes on with other rates.
    """
    recipe, device = plan.recipe, processes.device
    section = recipe.adapter if short else _silent(recipe.adapter)
    base = load.load_base(recipe.model, plan.base.folder, device, shards_of(plan))
    model = inject(base, section, recipe.training.seed, plan.steps, short)
    if section.scaling == "even":
        set_scales(model, even_scales(model))
    layers, objective = adapted_layers(model), plan.task.objective(without_adapter(model))
    trained = trainables(model, section, recipe.training.loraplus_ratio if short else 1.0)
    engine = Engine(objective, trained, recipe.training, plan.deepspeed, device)
    losses: list[float] = []
    try:
        probe = _probe(recipe.adapter, layers, recipe.training.seed)
        if short is None:
            samples = len(rows := rows_seen(plan))
            _see(plan, probe, engine, rows, processes)
        else:
            losses = _train_briefly(plan, probe, engine, processes)
            samples = len(losses) * recipe.training.global_batch
        engine.release()
        probe.sum_over(dist.all_reduce)
        found = {name: _of_layer(probe, name, recipe.adapter) for name in layers}
    finally:
        engine.close()
    del engine, objective, model, base, trained, probe, layers
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Measured(found, samples, losses)


def _probe(section: AdapterSection, layers: dict[str, GLoRALinear], seed: int) -> Probe:
    parts = 2 if section.predictor in OF_HALVES else 1
    return Probe(layers, section.rank, seed, lambda layer: whole(layer.parameters()), parts, _reads(section))


def _reads(section: AdapterSection) -> Reads:
    """Return the sums that the predictor and the modes of the slots need."""
    modes = {slot: {spec.mode for spec in specs} - {"none"} for slot, specs in structure_choices(section).items()}
    return Reads(
        through="lora" in modes["A"],
        gains=bool(modes["A"] - {"lora"}),
        shifts=bool(modes["B"] - {"lora"}),
        noise=section.predictor in OF_NOISE,
    )


def _see(plan: Plan, probe: Probe, engine: Engine, rows: list[int], processes: Processes) -> None:
    """Let the gradients of the samples pass by: batches are cut alike however many processes share them."""
    # in evaluation mode all activations are kept: a model that is trained with checkpointing gets row by row
    size = 1 if plan.recipe.model.gradient_checkpointing else min(plan.recipe.training.micro_batch, len(rows) // 2)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    for first in range(0, len(batches), processes.world_size):
        number = first + processes.process_rank
        batch = plan.batch(plan.task.train, batches[min(number, len(batches) - 1)])
        # a process without a batch keeps step, and adds nothing: divided layers need all processes
        part = number % probe.parts if number < len(batches) else None
        probe.see(lambda batch=batch: engine.loss(batch), part)  # type: ignore[misc]


def _train_briefly(plan: Plan, probe: Probe, engine: Engine, processes: Processes) -> list[float]:
    """Train the first steps at the full rate while the gradients of their samples pass by; return the losses.

    Every step's gradient is that of its mean loss, and counts alike. Of a gain, which is a vector in slot A, it is the
    gradient by the gain of the weight as it is trained.
    """
    training, losses = plan.recipe.training, []
    steps = short_steps(plan.recipe.adapter, plan.steps, training.global_batch)
    with probe.watching(0, 1 / (steps * processes.world_size)):  # DeepSpeed averages over the processes
        for step in range(steps):
            batches = plan.process_batches(step, processes.process_rank, processes.world_size)
            result = engine.train_step(batches, training.peak_lr, partial(seed_micro_step, training.seed, step))
            if result.skipped:
                raise NonFinite(
                    f"Step {step + 1} of {steps} of adapter.predictor short_run had a loss or gradient that is not "
                    f"finite, at training.lr {training.peak_lr:g}, which it trains at from its first step on. Lower "
                    "it, or take another predictor."
                )
            losses.append(result.loss)
    return losses


def _of_layer(probe: Probe, name: str, section: AdapterSection) -> LayerGradients:
    layer = probe.layers[name]
    sizes = sizes_of(layer)
    with probe.weight(layer) as w0:
        found = tuple(_gradients(probe, name, sketch, w0) for sketch in probe.sums[name])
    if section.scaling == "even":
        factors = {
            slot: {mode: factor(slot, mode, section.composition, sizes) for mode in ("lora", "vector", "scalar")}
            for slot in DEFAULT_LR_FACTORS
        }
    else:  # alpha scales products alone
        alpha = section.alpha
        factors = {
            slot: {"lora": rate, "vector": rate / alpha, "scalar": rate / alpha}
            for slot, rate in DEFAULT_LR_FACTORS.items()
        }
    return LayerGradients(found, factors)


@torch.no_grad()
def _gradients(probe: Probe, name: str, sketch: Sketch, w0: torch.Tensor) -> Gradients:
    """Return what the predictors read, in float64 on the CPU.

    Args:
        w0: (O, I), in float32.
    """
    bias, reads = probe.biases[name], probe.reads
    low = {"B": probe.directions(name, sketch)}
    if reads.through:
        low["A"] = probe.directions_through(name, sketch, w0)
    kept = {"A": "gains", "B": "shifts", "E": "total"}
    vectors = {slot: sketch[key] for slot, key in kept.items() if key in sketch}
    vectors["C"] = w0.t() @ sketch["total"]
    if bias is not None:
        vectors["D"] = bias * sketch["total"]
    noise: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    if reads.noise:
        dy, inputs, tokens = sketch["total2"], sketch["inputs2"].double(), float(sketch["tokens"])
        left = {slot: one.left if slot == "B" else w0.double() @ one.left for slot, one in low.items()}
        for slot, one in low.items():
            noise[slot] = (left[slot].square().t() @ dy.double()) * (one.right.square() @ inputs) / tokens
        squares = {slot: sketch[f"{key}2"] for slot, key in kept.items() if key in sketch}
        squares["C"] = w0.square().t() @ dy
        if bias is not None:
            squares["D"] = bias.square() * dy
    return Gradients(
        {slot: Directions(*(value.cpu() for value in one)) for slot, one in low.items()},
        *({slot: value.double().cpu() for slot, value in one.items()} for one in (vectors, noise, squares)),
    )
