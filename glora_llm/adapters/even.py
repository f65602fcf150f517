"""Scales of slots by which a step of one learning rate changes a layer's output alike: `adapter.scaling: even`.

Adam moves every entry of a parameter by about the rate, so how far the output moves depends on what stands around the
parameter. With x of unit size in each entry, `up` uniform in +-1 / sqrt(I), and `down` zero at the start, a step moves
each entry of the output by the rate times

    B lora          s down (up x)               s r, as the r columns of `down` move together: alpha, of s = alpha / r
    A lora          s W0 down (up x)            s r g,  g = |W0| / sqrt(O) (Frobenius norm): W0 x has entries of size g
    A hadamard      s (W0 * (down up)) x        s r g / sqrt(I), as the entries of `up` have any sign
    A block         s (W0 * blocks of 64) x     s r g / sqrt(I / 64)
    C lora          s W0 down up                s r g
    A vector        gain * (W0 x)               g; scalar likewise
    C vector        W0 c                        g
    D               d * b0                      |b0| / sqrt(O)
    B vector        shift * sum(x)              sqrt(I); scalar likewise
    E               e                           1

A slot is multiplied by what makes each of these alpha times a constant of the slot and mode (CONSTANTS): by the
constant over the last factor, and a vector or scalar, which has no s of its own, by alpha too. So a rate and an alpha
of the same product do the same, whatever the slots. The rows of an embedding are not multiplied with an x; they are
moved in proportion to their own size, u = |W0| / sqrt(V d): A lora and vector 1, A hadamard sqrt(d), A block
sqrt(d / 64), B lora u sqrt(d), B vector and E u; all times alpha.

The slots of a layer share one step out: each factor is divided by how many slots the layer has (of a supernet: may
have), as all of them move the output against the same gradient.

The columns of `down` move together where their gradients, which are dy times (up x), have one sign for each entry of
dy: in the first step exactly, later less. RANK_EXPONENT (`auto_rate`) says how much: a slot with a rank is scaled by
alpha / rank ^ RANK_EXPONENT, unless `rank_stabilized` asks for alpha / sqrt(rank). What that is beside the alpha / rank
of the path is part of the factor.

In a supernet each rank has its own alpha / rank (`glora.supernet.slot_choices`), and the factors of a mode are those of
its largest rank.

Not in this law: the size of x, which is not 1 (C, D and E do not meet it); that C, D and E move all tokens alike; that
a step of A or C lies along W0's leading directions, which W0 enlarges beyond g (by 11 where one singular value is 82
and the others at most 3); that columns of an embedding's slots do not move together; and that `up` moves too, along x
by up to I times the rate in a step (the reason for LoRA+, arXiv 2402.12354): see the width in `auto_rate`.

The norms are of the weight as it is trained on, quantised where it is quantised, gathered where ZeRO 3 divides it. They
are taken once, at the start of a run, and the factors are saved with the adapter: PEFT's configuration has them as
`scales`, so that merge, export, evaluation and a resumed run use the same ones.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glora_llm.adapters.auto_rate import RANK_EXPONENT
from glora_llm.adapters.inject import adapted_layers
from glora_llm.errors import UserError
from glora_llm.glora.embedding import GLoRAEmbedding
from glora_llm.glora.experts import GLoRAExperts
from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.path import SlotSpec, slots_with
from glora_llm.schema.slots import BLOCK, RANKED_MODES
from glora_llm.vlora.partitioned import whole

Scales = dict[str, dict[str, dict[str, float]]]  # layer -> slot -> mode -> factor
OF_VECTORS = {"A": 2.0, "B": 2.0, "C": 0.1, "D": 0.2, "E": 0.2}  # of CONSTANTS: slots in mode vector or scalar

# Of (slot, mode), A's hadamard product as a mode of its own; 1 where it is not here. Each is the best rate of that slot
# alone over that of B, rounded, on SmolLM2-135M and SST-2, where a best rate is known to a factor of about 1.5
# (docs/benchmarks/frontier.md, by scripts/bench_scales.py slots). D, which LLaMA-like models have no place for, and C
# in mode lora were not measured: they have those of E and of C's vector, which move all tokens alike as they do.
CONSTANTS: dict[tuple[str, str], float] = {
    ("A", "hadamard"): 3.0,
    ("A", "block"): 4.0,
    ("C", "lora"): 0.1,
    **{(slot, mode): size for slot, size in OF_VECTORS.items() for mode in ("vector", "scalar")},
}
DIGITS = 6  # of a factor: sums on other devices differ in the last bits


@torch.no_grad()
def even_scales(model: Any) -> Scales:
    """Return the factors of all slots and modes of a PEFT model's adapter; under ZeRO 3 all processes call it together.

    Args:
        model: with a GLoRA adapter `default`.
    """
    config, found = model.peft_config["default"], Scales()
    for name, layer in adapted_layers(model).items():
        sizes, composition, slots = sizes_of(layer), layer.composition["default"], _modes_of(layer)
        together = sum(bool(modes) for modes in slots.values()) or 1
        found[name] = {
            slot: {
                mode: _rounded(factor(slot, mode, composition, sizes) * _of_alpha(config, spec) / together)
                for mode, spec in sorted(modes.items())
            }
            for slot, modes in slots.items()
        }
    return found


def _of_alpha(config: Any, spec: SlotSpec) -> float:
    """Return what a slot gets of alpha, beside the scale that its path has.

    A genome's own scales are those of the supernet that it was found in, alpha / its largest rank: they are replaced.
    """
    stabilized = config.rank_stabilized and config.supernet is None
    if spec.mode not in RANKED_MODES:
        return float(config.alpha * (config.rank ** (RANK_EXPONENT - 0.5) if stabilized else 1.0))
    exponent = 0.5 if stabilized else RANK_EXPONENT
    if config.genome is not None:
        return float(config.alpha / spec.rank**exponent / spec.scale)
    return float(spec.rank ** ((0.5 if stabilized else 1.0) - exponent))


def require_even(model: Any) -> None:
    """Check that every adapted layer of a model has one weight, whose size can be taken.

    Raises:
        UserError: for stacked experts.
    """
    name = next((name for name, layer in adapted_layers(model).items() if isinstance(layer, GLoRAExperts)), None)
    if name is not None:
        raise UserError(
            f"adapter.scaling even scales slots by the size of a layer's weight, and {name} stacks those of several "
            "experts. Leave it out of adapter.targets, or set adapter.scaling=alpha."
        )


@dataclass(frozen=True)
class Sizes:
    """Of a layer.

    Args:
        outputs: g, the root mean square of the entries of W0 x; u of an embedding.
        bias: that of b0; 0 where there is none.
        in_features: I; d of an embedding.
        is_embedding: rows are looked up.
    """

    outputs: float
    bias: float
    in_features: int
    is_embedding: bool = False


def sizes_of(layer: GLoRALinear) -> Sizes:
    """Return the sizes of a layer's frozen weight and bias; under ZeRO 3 all processes call it together."""
    base = layer.get_base_layer()
    with whole(base.parameters()):
        weight, bias = dense_weight(base, torch.float32), layer.b0
        row_norms, found = weight.norm(dim=1), 0.0 if bias is None else _size(bias.float())
    size, is_embedding = _size(row_norms), isinstance(layer, GLoRAEmbedding)
    inputs = weight.shape[1]
    return Sizes(size / math.sqrt(inputs) if is_embedding else size, found, inputs, is_embedding)


def factor(slot: str, mode: str, composition: str, sizes: Sizes) -> float:
    """Return what a slot of a mode is multiplied by at alpha 1, beside 1 / rank of a slot that has one."""
    inputs, unit = sizes.in_features, sizes.outputs
    moved = {
        "A": unit,
        "B": math.sqrt(inputs) if mode != "lora" else 1.0,
        "C": unit,
        "D": sizes.bias,
        "E": 1.0,
    }[slot]
    if sizes.is_embedding and slot != "A":
        moved = 1 / math.sqrt(inputs) if (slot, mode) == ("B", "lora") else 1.0
    is_hadamard = (slot, mode, composition) == ("A", "lora", "hadamard")
    if is_hadamard:
        moved /= math.sqrt(inputs)
    if slot == "A" and mode == "block":
        moved /= math.sqrt(inputs / BLOCK)
    constant = CONSTANTS.get((slot, "hadamard" if is_hadamard else mode), 1.0)
    wanted = constant * (unit if sizes.is_embedding else 1.0)
    return wanted / moved if moved else 1.0


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


def _modes_of(layer: GLoRALinear) -> dict[str, dict[str, SlotSpec]]:
    """Return the modes that each slot may have, each at its largest rank: of a supernet all, else those of the path."""
    choices = layer.choices.get("default")
    if choices is None:
        return {slot: {spec.mode: spec} for slot, spec in layer.path["default"].active()}
    found: dict[str, dict[str, SlotSpec]] = {}
    for slot in slots_with(layer.b0 is not None):
        modes = found[slot] = {}
        for spec in choices[slot]:  # the largest rank of a mode first
            if spec.mode != "none":
                modes.setdefault(spec.mode, spec)
    return found
