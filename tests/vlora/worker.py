"""Trains a small VLoRA LLaMA at every ZeRO stage on two ranks, and compares each with its dense twin in plain torch.

deepspeed --num_gpus 2 tests/vlora/worker.py OUT.json            SCENARIOS
deepspeed --num_gpus 2 tests/vlora/worker.py OUT.json further    FURTHER
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.schema import TrainingSection
from glora_llm.training.adam_state import AdamState
from glora_llm.training.optim import Trainable, make_optimizer, parameter_groups, set_lr
from glora_llm.vlora import increments
from tests.vlora.conftest import shared, small_llama, twin

STEPS, ACCUMULATION, LR, DECAY = 2, 2, 0.1, 0.5
BY_KIND = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 2, "up_proj": 2, "down_proj": 2}
FORMS: dict[str, dict[str, Any]] = {
    "chain": {},
    "chain-thin": {"form": "thin"},
    "star-first": {"topology": "star", "base_gradient": "first"},
    "gains": {"gains": ["row", "column", "diagonal"], "increments": "all", "sharing": "cycle"},
    "muon": {"gains": ["row"], "form": "auto"},
    "gains-thin": {"gains": ["row", "column", "diagonal"], "form": "thin"},
    "star-gains": {"gains": ["row", "column", "diagonal"], "topology": "star", "base_gradient": "first"},
    "kinds": {"layers_per_compound": BY_KIND, "gains": {"q_proj": ["diagonal"], "down_proj": ["row", "column"]}},
    "means": {"topology": "star", "increments": "all"},  # the groups of a budget
}
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}
SCENARIOS = {
    "chain": [(0, "none"), (0, "reentrant"), (1, "non-reentrant"), *product((2, 3), CHECKPOINTING)],
    "chain-thin": [(3, "non-reentrant")],
    "star-first": [(2, "reentrant"), (3, "none"), (3, "non-reentrant")],
    "gains": [(0, "none"), (1, "non-reentrant"), (2, "non-reentrant"), (3, "none"), (3, "non-reentrant")],
    "muon": [(stage, "none") for stage in range(4)],
    "gains-thin": [(2, "none"), (3, "non-reentrant")],
    "star-gains": [(3, "non-reentrant")],
    "kinds": [(2, "none"), (3, "non-reentrant")],
    "means": [(1, "non-reentrant"), (3, "none")],
}
EVERY = [(0, "none"), (1, "non-reentrant"), (2, "none"), (3, "non-reentrant")]
FURTHER = {  # with those above every form at every stage
    form: [place for place in EVERY if place not in SCENARIOS[form]]
    for form in ("gains-thin", "star-gains", "kinds", "means")
}


def batch(step: int, part: int, rank: int) -> Tensor:
    """Return the tokens of one micro batch of one rank, (B, T)."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
    return torch.randint(0, 32, (2, 20), generator=generator)


def model_of(form: str) -> Any:
    """Return the model of a scenario: all linears of 4 layers in one compound, else as the form says."""
    model, size = small_llama(), 2 if "sharing" in FORMS[form] else 4
    keys = {"layers_per_compound": size, "form": "composed", **FORMS[form]}
    return shared(model, model.model.layers, **keys)


def config(stage: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: nothing persistent under stage 3, so whatever is read must be gathered."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    batches = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": ACCUMULATION}
    optimizer = {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}  # it would clip at 1 by default
    return {**batches, **optimizer, "zero_optimization": zero, "steps_per_print": 10**9}


def reference(form: str, processes: ranks.Processes) -> tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Train the dense twin over the batches of all ranks; return losses, gradients by step, and final weights."""
    model = model_of(form)
    optimizers: list[Any] = [torch.optim.SGD(model.parameters(), lr=LR)]
    if form == "muon":
        parameters = dict(model.named_parameters())
        matrices = [value for name, value in parameters.items() if is_matrix(name, value)]
        rest = [value for name, value in parameters.items() if not is_matrix(name, value)]
        options: dict[str, Any] = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        heads = [value for value in rest if value.dim() == 2]
        vectors = [value for value in rest if value.dim() == 1]
        adam = torch.optim.AdamW(heads, lr=LR, weight_decay=DECAY)
        adam.add_param_group({"params": vectors, "weight_decay": 0.0})
        optimizers = [torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, **options), adam]
    losses, grads = [], []
    for step in range(STEPS):
        total = torch.zeros(())
        summed: dict[str, Tensor] = {}
        for rank in range(processes.world_size):  # in the order of a launch, which adds up on each rank first
            model.zero_grad()
            for part in range(ACCUMULATION):
                ids = batch(step, part, rank)
                loss = twin(model, input_ids=ids, labels=ids).loss / (ACCUMULATION * processes.world_size)
                loss.backward()
                total += loss.detach()
            for name, value in model.named_parameters():
                summed[name] = value.grad.clone() if name not in summed else summed[name] + value.grad
        for name, value in model.named_parameters():
            value.grad = summed[name].clone()
        losses.append(float(total))
        grads.append(summed)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses, grads, {name: value.detach() for name, value in model.named_parameters()}


def trained(
    form: str, stage: int, reentrant: bool | None, expected: Any, processes: ranks.Processes
) -> dict[str, float]:
    """Train one scenario; return the largest relative errors of losses, gradients and final weights."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    losses, grads, weights = expected
    model = model_of(form)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=LR)
    if form == "muon":
        items = [Trainable(name, value, muon=is_matrix(name, value)) for name, value in model.named_parameters()]
        keys: dict[str, Any] = {"global_batch": 1, "micro_batch": 1, "steps": 1, "lr": LR, "optimizer": "muon"}
        settings = TrainingSection(**keys)
        optimizer = make_optimizer(settings, parameter_groups(items, DECAY), offload=False)
        set_lr(optimizer, LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage), dist_init_required=False)
    if form == "muon":
        optimizer.bind(AdamState(engine, stage, torch.device("cpu")).partitions)
    worst = {"loss": 0.0, "gradient": 0.0, "weight": 0.0}
    for step in range(STEPS):
        total = torch.zeros(1)
        for part in range(ACCUMULATION):
            ids = batch(step, part, processes.process_rank)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            total += loss.detach() / (ACCUMULATION * processes.world_size)
            if part + 1 < ACCUMULATION:
                engine.step()
        torch.distributed.all_reduce(total)
        worst["loss"] = max(worst["loss"], abs(float(total) / losses[step] - 1))
        for name, value in model.named_parameters():
            got = safe_get_full_grad(value)
            worst["gradient"] = max(worst["gradient"], error(got, grads[step][name]))
        engine.step()
    sizes = increments(model)
    wanted = 28 if "increments" in FORMS[form] else 18 if form == "kinds" else 21
    assert len(sizes) == wanted and all(size.norm > 0 for size in sizes.values())
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        for name, value in model.named_parameters():
            worst["weight"] = max(worst["weight"], error(value.detach(), weights[name]))
    engine.destroy()
    return worst


def is_matrix(name: str, value: Tensor) -> bool:
    """Tell whether Muon steps a parameter."""
    return ".layers." in name and value.dim() == 2


def error(got: Tensor, expected: Tensor) -> float:
    """Return |got - expected| / |expected|."""
    return float((got - expected).norm() / expected.norm())


def main() -> None:
    """Run every scenario; the first rank writes what came out."""
    quiet_libraries()
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    out, scenarios, processes = Path(words[0]), FURTHER if words[1:] else SCENARIOS, ranks.start()
    found: dict[str, Any] = {}
    for form in scenarios:
        expected = reference(form, processes)
        for stage, name in scenarios[form]:
            try:
                found[f"{form}/zero{stage}/{name}"] = trained(form, stage, CHECKPOINTING[name], expected, processes)
            except (AssertionError, RuntimeError) as failure:
                found[f"{form}/zero{stage}/{name}"] = f"{type(failure).__name__}: {failure}"[:500]
    if processes.is_main_process:
        out.write_text(json.dumps(found, indent=1))
    ranks.stop()


if __name__ == "__main__":
    main()
