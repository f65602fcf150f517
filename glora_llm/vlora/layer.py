"""One linear of a layer that shares its compound's base: it owns its increment and bias, and only reads the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.vlora.config import VLoRAConfig
from glora_llm.vlora.linear import compose, vlora_linear
from glora_llm.vlora.partitioned import also_reads, whole


class VLoRALinear(nn.Linear):
    """A linear whose weight is its compound's base plus increments: W = W_base + s sum_j B_j A_j.

    It is an `nn.Linear`, so PEFT's tuners wrap it; `weight` is the composed W, computed when it is read. The base is a
    parameter of the first layer's linear and is listed there alone: this module holds its neighbours without
    registering them. Own parameters: `increment_b` (O, r), `increment_a` (r, I), `bias` (O) or None.

    Args:
        replaced: the linear whose place this takes; its bias is kept, its weight is not.
        base: the first layer's linear.
        before: the layers 2..l-1 of this linear's compound.
        rank: r.
        config: scaling, topology, gradient, start and form.
        generator: a CPU generator that draws the increment; the default one if None.
    """

    def __init__(
        self,
        replaced: nn.Linear,
        base: nn.Linear,
        before: Sequence["VLoRALinear"],
        rank: int,
        config: VLoRAConfig,
        generator: torch.Generator | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = base.in_features, base.out_features, rank
        self.scale, self.form = config.scale(rank), config.form
        self.base_gradient = config.base_gradient == "all"
        self.register_parameter("bias", replaced.bias)
        like: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.increment_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        self.increment_a = nn.Parameter(torch.empty(rank, self.in_features, **like))
        for factor in (self.increment_a, self.increment_b) if config.start == "kaiming" else (self.increment_a,):
            _draw(factor, generator)
        # In a tuple, because a module or a list of modules would be registered, and its parameters listed twice.
        self._base = (base,)
        self._members: tuple[VLoRALinear, ...] = (*before, self) if config.topology == "chain" else (self,)
        self.train(replaced.training)

    def read(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return W_base (O, I), the B_j (O, r) and the A_j (r, I) that make up this layer's weight, own ones last.

        Each is read as an attribute of its owner: in a forward pass under ZeRO 3 that gathers a partitioned one.
        """
        return (
            self._base[0].weight,
            [member.increment_b for member in self._members],
            [member.increment_a for member in self._members],
        )

    def parts(self) -> list[nn.Parameter]:
        """Return every parameter that this layer computes with, also those of other layers."""
        owned = [getattr(member, name) for member in self._members for name in ("increment_b", "increment_a")]
        return [self._base[0].weight, *owned, *([] if self.bias is None else [self.bias])]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W' + b, (..., O), for x (..., I)."""
        base, ups, downs = self.read()
        also_reads(self, (base, *ups, *downs))
        return vlora_linear(x, base, ups, downs, self.bias, self.scale, self.base_gradient, self.form)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The composed W, (O, I), differentiable. It is computed: writing to it raises UserError."""
        base, ups, downs = self.read()
        composed = compose(base if self.base_gradient else base.detach(), ups, downs, self.scale)
        return composed.as_subclass(ComposedWeight)

    @torch.no_grad()
    def increment_norms(self) -> tuple[float, float]:
        """Return the Frobenius norms of s B_l A_l, this layer's own increment, and of W_base.

        The first is sqrt(sum((B'B) * (A A'))) s: nothing of size (O, I) is formed.
        """
        base = self._base[0].weight
        with whole([base, self.increment_b, self.increment_a]):
            square = self.increment_square()
            size = torch.linalg.vector_norm(base, dtype=torch.promote_types(base.dtype, torch.float32))
            return math.sqrt(float(square)), float(size)

    def increment_square(self) -> Tensor:
        """Return |s B_l A_l|^2 (Frobenius), a float64 scalar; the factors must be whole."""
        b, a = self.increment_b.detach().double(), self.increment_a.detach().double()
        return ((b.t() @ b) * (a @ a.t())).sum().clamp(min=0) * self.scale**2

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """Return a plain linear with the composed weight; trainable where the base is. It shares nothing with this."""
        with whole(self.parts()):
            base = self._base[0].weight
            made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
            made.weight = nn.Parameter(self.weight.clone(), requires_grad=base.requires_grad)
            if self.bias is not None:
                made.bias = nn.Parameter(self.bias.clone(), requires_grad=self.bias.requires_grad)
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of this layer."""
        return f"{super().extra_repr()}, rank={self.rank}, increments={len(self._members)}"


@dataclass(frozen=True)
class Composition:
    """The parts of one weight, by names in the model: W = base + scale * sum_j ups_j downs_j."""

    base: str
    ups: list[str]
    downs: list[str]
    scale: float


def compositions(model: nn.Module) -> dict[str, Composition]:
    """Return name of a composed weight -> its parts, for all VLoRA layers of a model."""
    owners = {module: name for name, module in model.named_modules()}
    found = {}
    for name, layer in vlora_layers(model).items():
        members = [owners[member] for member in layer._members]
        found[f"{name}.weight"] = Composition(
            f"{owners[layer._base[0]]}.weight",
            [f"{member}.increment_b" for member in members],
            [f"{member}.increment_a" for member in members],
            layer.scale,
        )
    return found


class ComposedWeight(Tensor):
    """The result of `VLoRALinear.weight`: a tensor whose operations give plain tensors, and which refuses `.data = `.

    PEFT's tuners merge by that assignment; to a computed weight it would be lost without a word.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The values, detached."""
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise UserError(
            "The weight of a VLoRALinear is composed of its compound's base and increments, so an adapter cannot be "
            "merged into it. Call glora_llm.vlora.to_dense(model) first, then merge."
        )


def vlora_layers(model: nn.Module) -> dict[str, VLoRALinear]:
    """Return name -> layer for every VLoRALinear of a model, also those that an adapter wraps."""
    return {name: module for name, module in model.named_modules() if isinstance(module, VLoRALinear)}


@torch.no_grad()
def _draw(factor: Tensor, generator: torch.Generator | None) -> None:
    """Fill a factor by Kaiming's rule, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), from a CPU generator on any device."""
    if factor.device.type == "meta":
        return
    drawn = torch.empty(factor.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    factor.copy_(drawn)
