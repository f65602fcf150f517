"""VLoRA of unequal compounds, chosen linear by linear.

For every kind of linear (q_proj, up_proj, ...) the layers are cut into consecutive groups. The layers of a group share
a base and add low-rank increments to it, W_l = W_base + B_l A_l; a group of one layer keeps its weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.vlora.compound import make_compounds
from glora_llm.vlora.config import VLoRAConfig
from glora_llm.vlora.convert import IncrementFit
from glora_llm.vlora.layer import VLoRALinear

# (layer, name of a linear inside it) -> root mean square of each of the linear's inputs, (I)
InputScales = Mapping[tuple[int, str], Tensor]


@dataclass(frozen=True)
class Group:
    """Consecutive layers whose linears of one name share a base.

    Args:
        linear: its name inside a layer.
        first: the first layer, from 0.
        count: of layers.
        rank: r of each increment; 0 where the group is one layer.
    """

    linear: str
    first: int
    count: int
    rank: int

    def config(self) -> VLoRAConfig:
        """Return the shape of these layers alone."""
        return VLoRAConfig([self.linear], None, self.rank, topology="star", increments="all")


@dataclass(frozen=True)
class UnequalSharing:
    """The groups of a model; linears that are in none stay per layer."""

    groups: tuple[Group, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the values for vlora.json."""
        return {"groups": [asdict(group) for group in self.groups]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "UnequalSharing":
        """Return what `as_json` gave.

        Raises:
            TypeError: for other values.
        """
        return cls(tuple(Group(**group) for group in values["groups"]))

    def shared(self) -> Iterator[Group]:
        """Yield the groups of several layers."""
        return (group for group in self.groups if group.count > 1)


def make_groups(
    model: nn.Module, layers: Sequence[nn.Module], sharing: UnequalSharing, generator: torch.Generator | None = None
) -> nn.Module:
    """Let the layers of a model share weights group by group, in place; see `make_compounds`.

    Raises:
        UserError: for layers or linears that cannot share; the groups before are changed then.
    """
    for group in sharing.shared():
        make_compounds(model, layers[group.first : group.first + group.count], group.config(), generator)
    return model


@torch.no_grad()
def groups_from_dense(
    model: nn.Module, layers: Sequence[nn.Module], sharing: UnequalSharing, scales: InputScales
) -> list[IncrementFit]:
    """Turn a dense model into VLoRA, in place: bases are the means of their layers, increments a truncated SVD.

    B_l A_l is the rank-r matrix with the least |(W_l - W_base - B_l A_l) diag(s)|, s the sizes of the linear's inputs:
    the truncated SVD U S V' of (W_l - W_base) diag(s) gives B_l = U sqrt(S) and A_l = sqrt(S) V' diag(1 / s).

    Args:
        scales: s; a linear that is not there has equal inputs.

    Returns:
        The errors, weighted so, of every linear of every layer that shares.
    """
    fits = []
    for group in sharing.shared():
        mine = layers[group.first : group.first + group.count]
        linears = [layer.get_submodule(group.linear) for layer in mine]
        wanted = [exact(linear.weight).clone() for linear in linears]
        linears[0].weight.copy_(torch.stack(wanted).mean(0))  # type: ignore[operator]
        make_compounds(model, mine, group.config())
        for number, (layer, weight) in enumerate(zip(mine, wanted, strict=True), group.first):
            made = layer.get_submodule(group.linear)
            assert isinstance(made, VLoRALinear)
            errors = _fit(made, weight, scales.get((number, group.linear)))
            fits.append(IncrementFit(number, group.linear, group.rank, *errors))
    return sorted(fits, key=lambda fit: fit.layer)


def exact(weight: Any) -> Tensor:
    """Return a weight in float32 at least, detached."""
    tensor: Tensor = weight.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _fit(made: VLoRALinear, weight: Tensor, scale: Tensor | None) -> tuple[float, float]:
    """Set an increment so that the layer's weight is near `weight` (O, I); return the weighted errors of both."""
    s = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device) if scale is None else scale.to(weight)
    difference = weight - exact(made.base_owner.weight)
    u, singular, v = torch.linalg.svd(difference * s, full_matrices=False)
    root = singular[: made.rank].sqrt()
    made.increment_b.copy_(u[:, : made.rank] * root)
    made.increment_a.copy_(root[:, None] * v[: made.rank] / s)
    lost, before, size = (
        float(torch.linalg.vector_norm(part * s)) for part in (weight - exact(made.weight), difference, weight)
    )
    return lost / before if before else 0.0, lost / size if size else 0.0
