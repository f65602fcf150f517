"""Measure the time and the memory that each slot adds to a training step, for limits on both."""

import statistics
import time

import torch
from torch import nn

from glora_llm.glora.config import GLoRAConfig
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.path import LayerPath, SlotSpec, slots_with
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
        slots = [(slot, spec) for slot in slots_with(layer.has_bias) for spec in space.choices[slot]]
        found |= {cost_key(layer, slot, spec): {"seconds": 0.0, "megabytes": 0.0} for slot, spec in slots}
        trials = {
            cost_key(layer, slot, spec): _Trial(layer, slot, spec, *where)
            for slot, spec in slots
            if spec.mode != "none"
        }
        bare = _Trial(layer, "A", SlotSpec("none"), *where)
        times: dict[str, list[float]] = {key: [] for key in trials}
        for _ in range(rounds):
            reference = bare.seconds()
            for key, trial in trials.items():
                times[key].append(trial.seconds() - reference)
        kept = bare.saved()
        for key, trial in trials.items():
            megabytes = (trial.weights() + max(0, trial.saved() - kept)) / 1e6
            found[key] = {"seconds": max(0.0, statistics.median(times[key])), "megabytes": megabytes}
    return found


class _Trial:
    """A linear of a layer's shape with one slot, and an input and an output gradient for it."""

    def __init__(
        self,
        layer: LayerShape,
        slot: str,
        spec: SlotSpec,
        composition: str,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        base = nn.Linear(layer.in_features, layer.out_features, bias=layer.has_bias, dtype=dtype, device=device)
        self.linear = GLoRALinear(base.requires_grad_(False))
        self.linear.update_layer("default", GLoRAConfig(composition=composition), LayerPath(((slot, spec),)))
        self.linear.set_adapter("default")
        self.x = torch.randn(tokens, layer.in_features, dtype=dtype, device=device, requires_grad=True)
        self.dy = torch.randn(tokens, layer.out_features, dtype=dtype, device=device)

    def seconds(self) -> float:
        """Return the time of one forward and backward pass."""
        self._wait()
        began = time.perf_counter()
        self.linear(self.x).backward(self.dy)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.x.device.type == "cuda":
            torch.cuda.synchronize(self.x.device)

    def weights(self) -> int:
        """Return the bytes of the slot's weights, gradient and Adam moments in float32."""
        return 16 * sum(p.numel() for p in self.linear.parameters() if p.requires_grad)

    def saved(self) -> int:
        """Return the bytes that the layer keeps for its backward pass beside its own parameters, each tensor once."""
        kept: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in self.linear.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.linear(self.x)
        return sum(kept.values())
