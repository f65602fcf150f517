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


@dataclass(frozen=True)
class Calibration:
    """Measurements of the linears of a dense model on some text; keys are (layer, name of a linear inside it).

    Args:
        roots: R (I, I), lower triangular, with R R' = E[x x'] of a linear's inputs x over tokens, so that |E R|^2
            (Frobenius) is the mean square of the outputs E x; where it is missing, 1.
        gradients: g (O), the root mean squares over tokens of the gradient of the loss (summed over the tokens of a
            row, in nats) with respect to each of a linear's outputs at a token, none of them 0; of all linears, or
            empty.
    """

    roots: Mapping[tuple[int, str], Tensor]
    gradients: Mapping[tuple[int, str], Tensor]

    def root(self, key: tuple[int, str], like: Tensor) -> Tensor | None:
        """Return R in another tensor's dtype and place."""
        found = self.roots.get(key)
        return None if found is None else found.to(like)

    def gradient(self, key: tuple[int, str], like: Tensor) -> Tensor | None:
        """Return g in another tensor's dtype and place, as a column (O, 1)."""
        found = self.gradients.get(key)
        return None if found is None else found.to(like)[:, None]


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
    model: nn.Module, layers: Sequence[nn.Module], sharing: UnequalSharing, measured: Calibration
) -> list[IncrementFit]:
    """Turn a dense model into VLoRA, in place: bases are the means of their layers, increments a truncated SVD.

    B_l A_l is the rank-r matrix with the least |diag(g) (W_l - W_base - B_l A_l) R|, where R R' = E[x x'] of the
    linear's inputs and g are the root mean squares of the gradient at its outputs (see `group_losses`): the truncated
    SVD U S V' of diag(g) (W_l - W_base) R gives B_l = diag(1 / g) U sqrt(S) and A_l = sqrt(S) V' R^-1.

    Args:
        measured: R and g.

    Returns:
        The errors of every linear of every layer that shares: root mean squares of outputs over the text that was
        measured, all outputs alike.
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
            errors = _fit(made, weight, measured, (number, group.linear))
            fits.append(IncrementFit(number, group.linear, group.rank, *errors))
    return sorted(fits, key=lambda fit: fit.layer)


def exact(weight: Any) -> Tensor:
    """Return a weight in float32 at least, detached."""
    tensor: Tensor = weight.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def product(matrix: Tensor, root: Tensor | None) -> Tensor:
    """Return matrix R."""
    return matrix if root is None else matrix @ root


def smaller_gram(matrix: Tensor) -> Tensor:
    """Return the smaller of X X' and X' X of a matrix X (O, I): its eigenvalues are X's squared singular values."""
    return matrix.mT @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.mT


def _fit(made: VLoRALinear, weight: Tensor, measured: Calibration, key: tuple[int, str]) -> tuple[float, float]:
    """Set an increment so that the layer's weight is near `weight` (O, I); return the weighted errors of both."""
    root, g = measured.root(key, weight), measured.gradient(key, weight)
    difference = product(weight - exact(made.base_owner.weight), root)
    rows: Tensor | float = 1.0 if g is None else g / g.square().mean().sqrt()
    b, a = _truncated(rows * difference, made.rank)
    made.increment_b.copy_(b / rows)
    made.increment_a.copy_(a if root is None else torch.linalg.solve_triangular(root, a, upper=False, left=False))
    lost, before, size = (
        float(torch.linalg.vector_norm(part))
        for part in (product(weight - exact(made.weight), root), difference, product(weight, root))
    )
    return lost / before if before else 0.0, lost / size if size else 0.0


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U sqrt(S) (O, r) and sqrt(S) V' (r, I) of the largest singular values.

    By the eigenvectors of the smaller product of the matrix with itself, ten times as fast as its decomposition: what
    they span is all that an error depends on.
    """
    values, vectors = torch.linalg.eigh(smaller_gram(matrix))
    vectors, roots = vectors[:, -rank:].flip(1), values[-rank:].flip(0).clamp(min=0) ** 0.25  # of singular values
    inverse = torch.where(roots > 0, 1 / roots, 0)
    if matrix.shape[0] > matrix.shape[1]:
        return matrix @ vectors * inverse, roots[:, None] * vectors.mT
    return vectors * roots, inverse[:, None] * (vectors.mT @ matrix)
