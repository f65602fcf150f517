"""Compounds: every k layers of a model share a base.

W_1 = W_base; W_l = W_(l-1) + s B_l A_l for l = 2..k (arXiv 2406.09315); with gains as in `weight`. Norms, biases,
embeddings and heads stay per layer: only the weights of the chosen linears are shared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from glora_llm.errors import UserError, nearest
from glora_llm.vlora.config import VLoRAConfig, names, one_of
from glora_llm.vlora.layer import Base, VLoRALinear
from glora_llm.vlora.partitioned import is_partitioned


@dataclass(frozen=True)
class Shared:
    """One linear of the layers that share a base.

    Args:
        name: inside a layer.
        numbers: of those layers, rising.
        linears: theirs.
    """

    name: str
    numbers: Sequence[int]
    linears: list[nn.Linear]


@dataclass(frozen=True)
class CompoundLayout:
    """The compounds of a model, checked; nothing is changed yet.

    Args:
        layers: of the whole model, in order.
        config: the shape.
        ranks: name of a linear inside a layer -> r.
        groups: name of a linear inside a layer -> numbers of the layers that share each of its bases.
    """

    layers: list[nn.Module]
    config: VLoRAConfig
    ranks: dict[str, int]
    groups: dict[str, list[range]]

    def compounds(self) -> Iterator[Shared]:
        """Yield every compound of every linear, in the order of their first layers."""
        found = [(group, name) for name, groups in self.groups.items() for group in groups]
        for group, name in sorted(found, key=lambda pair: pair[0][0]):  # a stable sort: linears stay in their order
            members = [self.layers[number].get_submodule(name) for number in group]
            yield Shared(name, list(group), [member for member in members if isinstance(member, nn.Linear)])


def make_compounds(
    model: nn.Module, layers: Sequence[nn.Module], config: VLoRAConfig, generator: torch.Generator | None = None
) -> nn.Module:
    """Turn a model into VLoRA, in place: in every compound, layers 2..k take the first one's weights as their base.

    The base keeps the first layer's values; the weights of the others are dropped (`from_dense` keeps them as
    increments). Call it before DeepSpeed takes the model.

    Args:
        model: the model that the layers are of.
        layers: like modules, in order: `model.model.layers` of LLaMA, `vit.layers` of ViT, or one's own stack.
        config: the shape.
        generator: a CPU generator that draws the increments; the default one if None.

    Returns:
        The model.

    Raises:
        UserError: for layers or linears that cannot share; nothing is changed then.
    """
    layout = lay_out_compounds(model, layers, config)
    for shared in layout.compounds():
        for linear, made in zip(*share_linears(shared, layout, generator), strict=True):
            put(model, linear, made)
    if config.norm_spread:
        _spread_norms(layout.layers, config.norm_spread, generator)
    return model


def share_linears(
    shared: Shared, layout: CompoundLayout, generator: torch.Generator | None = None
) -> tuple[list[nn.Linear], list[VLoRALinear]]:
    """Return the linears of a compound that add an increment, and what takes their places, with a start of its own.

    The base keeps the values of the first layer. Nothing in the model is replaced yet.
    """
    config, rank = layout.config, layout.ranks[shared.name]
    first = shared.linears[0]
    own = config.increments == "all"
    base, rest = (Base(cast(nn.Parameter, first.weight)), shared.linears) if own else (first, shared.linears[1:])
    made: list[VLoRALinear] = []
    for linear in rest:
        made.append(VLoRALinear(linear, base, made, rank, config, config.gains_of(shared.name), generator))
    return rest, made


@torch.no_grad()
def _spread_norms(layers: list[nn.Module], spread: float, generator: torch.Generator | None) -> None:
    """Multiply the vectors named `weight` of the layers, which are those of norms, by random factors around 1."""
    for layer in layers:
        for module in layer.modules():
            gain = module._parameters.get("weight")
            if gain is not None and gain.dim() == 1 and gain.device.type != "meta":
                factors = torch.normal(1.0, spread, gain.shape, generator=generator)
                gain.mul_(factors.to(gain.device, gain.dtype))


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever the model holds it."""
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    for parent, name in places:
        setattr(parent, name, new)


def lay_out_compounds(model: nn.Module, layers: Sequence[nn.Module], config: VLoRAConfig) -> CompoundLayout:
    """Check that the layers can share weights as the config says.

    Raises:
        UserError: layers that are not of the model, repeat, or differ; k that does not divide them; a target that is
            in no layer or not in all; linears that are quantised, already shared, or of unlike shapes; a rank above
            the smaller side; parameters that ZeRO 3 has split.
    """
    layers = list(layers)
    if not layers:
        raise UserError("There are no layers; expected the model's list of like layers, e.g. model.model.layers.")
    _check_alike(model, layers)
    found = [_linears(layer) for layer in layers]
    chosen = _chosen(found, config.targets)
    for name in chosen:
        _check_linears(name, [linears[name] for linears in found])
    groups = {name: config.compounds(len(layers), name) for name in chosen}
    ranks = {name: one_of(config.rank, name, "rank") for name in chosen}
    for key in ("layers_per_compound", "rank", "gains"):
        _check_named(key, getattr(config, key), chosen)
    _check_ranks(ranks, found[0])
    return CompoundLayout(layers, config, ranks, groups)


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def _check_alike(model: nn.Module, layers: list[nn.Module]) -> None:
    held = set(model.modules())
    for number, layer in enumerate(layers):
        if layer not in held:
            raise UserError(f"Layer {number} is no part of the model; expected layers of the model that is given.")
        if type(layer) is not type(layers[0]):
            raise UserError(
                f"Layer {number} is a {type(layer).__name__} and layer 0 a {type(layers[0]).__name__}: layers of "
                "different classes cannot share weights. Give the like layers alone."
            )
    if len(set(layers)) < len(layers):
        raise UserError("The same layer is in the list twice; expected different layers, each with its own weights.")


def _chosen(found: list[dict[str, nn.Linear]], targets: Sequence[str] | None) -> list[str]:
    """Return the linears that the targets mean, which must be in every layer."""
    every = list(dict.fromkeys(name for linears in found for name in linears))
    wanted = every if targets is None else [name for name in every if any(names(name, t) for t in targets)]
    for target in targets or ():
        if not any(names(name, target) for name in every):
            raise UserError(
                f"No layer has a linear '{target}'; there is: {', '.join(every) or 'none'}.{_near(target, every)}"
            )
    if not wanted:
        raise UserError("No linear was chosen; expected layers that hold nn.Linear, and targets that name some.")
    for name in wanted:
        absent = [number for number, linears in enumerate(found) if name not in linears]
        if absent:
            there = list(found[absent[0]])
            raise UserError(
                f"Layer {absent[0]} has no linear '{name}', which other layers have; it has: "
                f"{', '.join(there) or 'none'}.{_near(name, there)} Name by `targets` what all layers have."
            )
    return wanted


def _near(name: str, known: Sequence[str]) -> str:
    return nearest(name, [one.rpartition(".")[2] for one in known]) or nearest(name, known)


def _check_linears(name: str, linears: list[nn.Linear]) -> None:
    for number, linear in enumerate(linears):
        _check_plain(f"layer {number}, '{name}'", linear)
        mine, first = _likeness(linear), _likeness(linears[0])
        if mine != first:
            raise UserError(
                f"'{name}' is {mine} in layer {number} and {first} in layer 0; layers that share a weight must have "
                "the same. Leave it out of `targets`."
            )
    if len({id(linear.weight) for linear in linears}) < len(linears):
        raise UserError(f"'{name}' has one weight for several layers already; expected a weight in each layer.")


def _check_plain(where: str, linear: nn.Linear) -> None:
    kind = type(linear).__name__
    if isinstance(linear, VLoRALinear):
        raise UserError(f"{where}: already a VLoRALinear. Call to_dense(model) first to share it anew.")
    if not linear.weight.is_floating_point() or hasattr(linear.weight, "quant_state"):
        raise UserError(
            f"{where}: a {kind} is quantised, and a base that is trained must be dense. Load the model without "
            "quantisation."
        )
    if type(linear) is not nn.Linear:
        raise UserError(f"{where}: a {kind} is more than an nn.Linear. Leave it out of `targets`.")
    if is_partitioned(linear.weight):
        raise UserError(f"{where}: ZeRO 3 has split its weight. Share weights before deepspeed.initialize.")


def _likeness(linear: nn.Linear) -> str:
    shape = f"({linear.out_features}, {linear.in_features})"
    bias = "with" if linear.bias is not None else "without"
    return f"{shape} {str(linear.weight.dtype).removeprefix('torch.')} on {linear.weight.device} {bias} bias"


def _check_named(key: str, given: object, chosen: Sequence[str]) -> None:
    """Check that a setting by linear names shared linears alone."""
    for target in given if isinstance(given, Mapping) else ():
        if not any(names(name, target) for name in chosen):
            raise UserError(f"{key} names '{target}', which is not shared; shared: {', '.join(chosen)}."
                            f"{_near(target, chosen)}")  # fmt: skip


def _check_ranks(ranks: dict[str, int], linears: dict[str, nn.Linear]) -> None:
    for name, rank in ranks.items():
        smaller = min(linears[name].out_features, linears[name].in_features)
        if rank > smaller:
            raise UserError(
                f"rank is {rank} for '{name}', whose smaller side is {smaller}: that is more than full rank. "
                f"Use at most {smaller}."
            )
