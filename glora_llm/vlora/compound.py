"""Compounds: every k layers of a model share a base.

W_1 = W_base; W_l = W_(l-1) + s B_l A_l for l = 2..k (arXiv 2406.09315). Norms, biases, embeddings and heads stay per
layer: only the weights of the chosen linears are shared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from glora_llm.errors import UserError, nearest
from glora_llm.vlora.config import VLoRAConfig, names
from glora_llm.vlora.layer import VLoRALinear
from glora_llm.vlora.partitioned import is_partitioned


@dataclass(frozen=True)
class CompoundLayout:
    """The compounds of a model, checked; nothing is changed yet.

    Args:
        layers: of the whole model, in order.
        size: k, layers per compound.
        ranks: name of a linear inside a layer -> r.
    """

    layers: list[nn.Module]
    size: int
    ranks: dict[str, int]

    def compounds(self) -> Iterator[tuple[str, list[nn.Linear]]]:
        """Yield (name inside the layer, the k linears that share a base), compound by compound."""
        for first in range(0, len(self.layers), self.size):
            for name in self.ranks:
                members = [layer.get_submodule(name) for layer in self.layers[first : first + self.size]]
                yield name, [member for member in members if isinstance(member, nn.Linear)]


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
    for name, linears in layout.compounds():
        members: list[VLoRALinear] = []
        for linear in linears[1:]:
            made = VLoRALinear(linear, linears[0], members, layout.ranks[name], config, generator)
            members.append(made)
            put(model, linear, made)
    return model


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
    size = config.compound_size(len(layers))
    _check_alike(model, layers)
    found = [_linears(layer) for layer in layers]
    chosen = _chosen(found, config.targets)
    for name in chosen:
        _check_linears(name, [linears[name] for linears in found])
    ranks = {name: _rank(name, config.rank) for name in chosen}
    _check_ranks(ranks, found[0], config.rank)
    return CompoundLayout(layers, size, ranks)


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


def _rank(name: str, rank: int | Mapping[str, int]) -> int:
    if isinstance(rank, int):
        return rank
    found = [value for target, value in rank.items() if names(name, target)]
    if len(found) != 1:
        raise UserError(
            f"rank has {len(found)} entries for the linear '{name}': {', '.join(rank) or 'it is empty'}. "
            "Expected one for each linear that is shared, or one number for all."
        )
    return found[0]


def _check_ranks(ranks: dict[str, int], linears: dict[str, nn.Linear], given: int | Mapping[str, int]) -> None:
    for target in () if isinstance(given, int) else given:
        if not any(names(name, target) for name in ranks):
            raise UserError(f"rank names '{target}', which is not shared; shared: {', '.join(ranks)}."
                            f"{_near(target, list(ranks))}")  # fmt: skip
    for name, rank in ranks.items():
        smaller = min(linears[name].out_features, linears[name].in_features)
        if rank > smaller:
            raise UserError(
                f"rank is {rank} for '{name}', whose smaller side is {smaller}: that is more than full rank. "
                f"Use at most {smaller}."
            )
