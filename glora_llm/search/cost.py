"""What a slot adds to a training step, measured: for limits on time and memory."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from glora_llm.glora.config import GLoRAConfig
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.path import Path, SlotSpec
from glora_llm.search.space import LayerShape, Space

Costs = dict[str, dict[str, float]]  # key of `cost_key` -> {seconds, megabytes}


def cost_key(layer: LayerShape, slot: str, spec: SlotSpec) -> str:
    """Return the name under which a cost is kept; layers of one shape are alike."""
    bias = "with bias" if layer.has_bias else "no bias"
    return f"{layer.out_features}x{layer.in_features} {bias} {slot} {spec.mode} {spec.rank}"


def measure(space: Space, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int = 9) -> Costs:
    """Measure forward and backward of one linear with one slot, less those of the bare linear.

    Args:
        tokens: of a micro batch.
        rounds: timed repetitions; all slots take turns, and the median of the differences within a turn counts.

    Returns:
        seconds of a step and megabytes (weights in float32 with gradient and both Adam moments, and what is saved for
        the backward pass), never below 0, by `cost_key`.
    """
    found: Costs = {}
    where = (space.composition, tokens, dtype, device)
    for layer in {shape[1:]: shape for shape in space.layers}.values():
        trials: dict[str, tuple[Callable[[], None], GLoRALinear]] = {}
        for slot in space.choices if layer.has_bias else "ABCE":
            for spec in space.choices[slot]:
                trials[cost_key(layer, slot, spec)] = _trial(layer, slot, spec, *where)
        bare, bare_linear = _trial(layer, "A", SlotSpec("none"), *where)
        times: dict[str, list[float]] = {key: [] for key in trials}
        for _ in range(rounds):
            reference = _seconds(bare, device)
            for key, (step, _) in trials.items():
                times[key].append(_seconds(step, device) - reference)
        kept = _saved(bare_linear, layer, tokens, dtype, device)
        for key, (_, linear) in trials.items():
            none = " none " in key
            weights = 16 * sum(p.numel() for p in linear.parameters() if p.requires_grad)
            saved = _saved(linear, layer, tokens, dtype, device) - kept
            seconds = 0.0 if none else max(0.0, statistics.median(times[key]))
            found[key] = {"seconds": seconds, "megabytes": 0.0 if none else (weights + max(0, saved)) / 1e6}
    return found


def _trial(
    layer: LayerShape,
    slot: str,
    spec: SlotSpec,
    composition: str,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Callable[[], None], GLoRALinear]:
    base = nn.Linear(layer.in_features, layer.out_features, bias=layer.has_bias, dtype=dtype, device=device)
    linear = GLoRALinear(base.requires_grad_(False))
    linear.update_layer("default", GLoRAConfig(composition=composition), Path(((slot, spec),)))
    linear.set_adapter("default")
    x = torch.randn(tokens, layer.in_features, dtype=dtype, device=device, requires_grad=True)
    dy = torch.randn(tokens, layer.out_features, dtype=dtype, device=device)
    return lambda: linear(x).backward(dy), linear


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _saved(linear: GLoRALinear, layer: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes that the layer keeps for its backward pass beside its own parameters, each tensor once."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in linear.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(tokens, layer.in_features, dtype=dtype, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(x)
    return sum(kept.values())
