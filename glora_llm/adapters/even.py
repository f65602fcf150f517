"""Scales of slots by which a step of one learning rate changes a layer's output alike: `adapter.scaling: even`.

Adam moves every entry of a parameter by about the learning rate, so how far the output moves depends on what stands
around the parameter. With x of unit size in each entry, `up` uniform in +-1 / sqrt(I), and `down` zero at the start:

    B lora          down (up x)                 1
    A lora          W0 down (up x)              g = |W0| / sqrt(O)     (Frobenius norm), as W0 x has entries of size g
    A hadamard      (W0 * (down up)) x          g / sqrt(I)
    A vector        gain * (W0 x)               g                      mode block and scalar alike
    C               W0 c                        g
    D               d * b0                      |b0| / sqrt(O)
    B vector        shift * sum(x)              sqrt(I)
    E               e                           1

The factor of a slot is one over that, times a constant of the slot and mode, which is measured
(docs/benchmarks/frontier.md). The norms are of the weight as it is trained on, quantised where it is quantised; they
are taken once, at the start of a run, and the factors are saved with the adapter: PEFT's configuration has them as
`scales`, so that merge, export and a resumed run use the same ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glora_llm.adapters.inject import adapted_layers
from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.path import slots_with
from glora_llm.vlora.partitioned import whole

Scales = dict[str, dict[str, dict[str, float]]]  # layer -> slot -> mode -> factor

CONSTANTS: dict[tuple[str, str], float] = {}  # of (slot, mode); 1 where it is not here
DIGITS = 6  # of a factor: sums over other divisions of a weight differ in the last bits


@torch.no_grad()
def even_scales(layers: Mapping[str, GLoRALinear]) -> Scales:
    """Return the factors of all slots and modes that the layers hold; under ZeRO 3 all processes call it together.

    Args:
        layers: by their names in the base model, with the adapter `default` in them.
    """
    found: Scales = {}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        with whole(base.parameters()):
            weight, bias = dense_weight(base, torch.float32), layer.b0
            rows = weight.flatten(0, -2)  # of stacked experts: of all of them
            sizes = Sizes(_size(rows.norm(dim=1)), 0.0 if bias is None else _size(bias.float()), rows.shape[1])
        found[name] = {
            slot: {mode: _rounded(factor(slot, mode, layer.composition["default"], sizes)) for mode in sorted(modes)}
            for slot, modes in _modes_of(layer).items()
        }
    return found


@dataclass(frozen=True)
class Sizes:
    """Of a layer.

    Args:
        outputs: g, the root mean square of the entries of W0 x.
        bias: that of b0; 0 where there is none.
        in_features: I.
    """

    outputs: float
    bias: float
    in_features: int


def factor(slot: str, mode: str, composition: str, sizes: Sizes) -> float:
    """Return what a slot of a mode is multiplied by, beside alpha / rank."""
    moved = {
        "A": sizes.outputs,
        "B": math.sqrt(sizes.in_features) if mode != "lora" else 1.0,
        "C": sizes.outputs,
        "D": sizes.bias,
        "E": 1.0,
    }[slot]
    if slot == "A" and mode == "lora" and composition == "hadamard":
        moved /= math.sqrt(sizes.in_features)
    return CONSTANTS.get((slot, mode), 1.0) / moved if moved else 1.0


def _size(values: Tensor) -> float:
    """Return the root mean square of values."""
    return float(values.double().square().mean().sqrt())


def set_scales(model: Any, scales: Scales) -> None:
    """Give the layers of a PEFT model their factors, and the configuration, with which they are saved."""
    model.peft_config["default"].scales = scales
    for name, layer in adapted_layers(model).items():
        layer.scales["default"] = scales.get(name, {})


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _modes_of(layer: GLoRALinear) -> dict[str, set[str]]:
    """Return the modes that each slot of a layer may have: all of a supernet's, or that of its path."""
    choices = layer.choices.get("default")
    if choices is None:
        return {slot: {spec.mode} for slot, spec in layer.path["default"].active()}
    return {
        slot: {spec.mode for spec in choices[slot] if spec.mode != "none"} for slot in slots_with(layer.b0 is not None)
    }
