"""One linear of a layer that shares its compound's base: it owns its increment and bias, and only reads the rest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.vlora.config import VLoRAConfig
from glora_llm.vlora.linear import vlora_linear
from glora_llm.vlora.partitioned import also_reads, whole
from glora_llm.vlora.weight import Added, Parts, accumulate, compose

FACTORS = ("increment_b", "increment_a", "increment_row", "increment_column", "increment_diagonal")


class Base(nn.Module):
    """A base that is no layer's own weight: its parameter `weight` (O, I). It holds the parameter and is not called."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight


class VLoRALinear(nn.Linear):
    """A linear whose weight is its compound's base plus increments: W = W_base + s sum_j B_j A_j, and gains.

    It is an `nn.Linear`, so PEFT's tuners wrap it; `weight` is the composed W, computed when it is read. The base is a
    parameter of the first layer's linear (or, where all layers add increments, of its `compound_base`) and is listed
    there alone: this module holds its neighbours without registering them. Own parameters: `increment_b` (O, r),
    `increment_a` (r, I), `bias` (O) or None, and of `increment_row` (O), `increment_column` (I) and
    `increment_diagonal` (min(O, I)) those that `gains` names.

    Args:
        replaced: the linear whose place this takes; its bias is kept, its weight is not.
        base: the first layer's linear, or what holds the base in its place.
        before: the layers of this linear's compound that add increments before it.
        rank: r.
        config: scaling, topology, gradient, start and form.
        gains: of `row`, `column` and `diagonal`.
        generator: a CPU generator that draws the increment; the default one if None.
    """

    def __init__(
        self,
        replaced: nn.Linear,
        base: nn.Linear | Base,
        before: Sequence["VLoRALinear"],
        rank: int,
        config: VLoRAConfig,
        gains: Sequence[str] = (),
        generator: torch.Generator | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = replaced.in_features, replaced.out_features, rank
        self.scale, self.form = config.scale(rank), config.form
        self.base_gradient = config.base_gradient == "all"
        self.register_parameter("bias", replaced.bias)
        like: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.increment_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        self.increment_a = nn.Parameter(torch.empty(rank, self.in_features, **like))
        for name, length in zip(FACTORS[2:], self._lengths(), strict=True):
            wanted = name.removeprefix("increment_") in gains
            self.register_parameter(name, nn.Parameter(torch.zeros(length, **like)) if wanted else None)
        for factor in (self.increment_a, self.increment_b) if config.start == "kaiming" else (self.increment_a,):
            _draw(factor, generator)
        # In a tuple, because a module or a list of modules would be registered, and its parameters listed twice.
        self._base = (base,)
        self._members: tuple[VLoRALinear, ...] = (*before, self) if config.topology == "chain" else (self,)
        if isinstance(base, Base) and not before:
            self.compound_base = base
        if config.start == "small":
            self._draw_small(config.start_scale, generator)
        self.train(replaced.training)

    def _lengths(self) -> tuple[int, int, int]:
        """Return the lengths of row gain, column gain and diagonal."""
        return self.out_features, self.in_features, min(self.out_features, self.in_features)

    @torch.no_grad()
    def _draw_small(self, share: float, generator: torch.Generator | None) -> None:
        """Draw B so that the entries of s B A are `share` of the base's, in the root mean square.

        An entry of A has variance 1 / (3 I) (`_draw`), one of B A therefore r var(B) / (3 I).
        """
        base = self._base[0].weight
        if base.device.type == "meta":
            return
        drawn = torch.empty(self.increment_b.shape, dtype=torch.float32).normal_(generator=generator)
        size = float(base.to(torch.promote_types(base.dtype, torch.float32)).square().mean().sqrt())
        deviation = share * size * math.sqrt(3 * self.in_features / self.rank) / self.scale
        self.increment_b.copy_(drawn * deviation)

    def added(self) -> Added:
        """Return this layer's own increment.

        Each part is read as an attribute: in a forward pass under ZeRO 3 that gathers a partitioned one.
        """
        return Added(*(getattr(self, name) for name in FACTORS))

    def read(self) -> Parts:
        """Return what makes up this layer's weight."""
        return accumulate(self._base[0].weight, [member.added() for member in self._members])

    def parts(self) -> list[nn.Parameter]:
        """Return every parameter that this layer computes with, also those of other layers."""
        owned = [part for member in self._members for part in member.factors()]
        base = cast(nn.Parameter, self._base[0].weight)
        return [base, *owned, *([] if self.bias is None else [self.bias])]

    @property
    def base_owner(self) -> nn.Module:
        """The module whose `weight` is the base: the first layer's linear, or a `Base`."""
        return self._base[0]

    def factors(self) -> list[nn.Parameter]:
        """Return the parameters of this layer's own increment."""
        found = (self._parameters[name] for name in FACTORS)
        return [parameter for parameter in found if parameter is not None]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W' + b, (..., O), for x (..., I)."""
        parts = self.read()
        also_reads(self, (parameter for parameter in self.parts() if parameter is not self.bias))
        return vlora_linear(x, parts, self.bias, self.scale, self.base_gradient, self.form)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The composed W, (O, I), differentiable. It is computed: writing to it raises UserError."""
        parts = self.read()
        composed = compose(parts if self.base_gradient else parts._replace(base=parts.base.detach()), self.scale)
        return composed.as_subclass(ComposedWeight)

    @torch.no_grad()
    def increment_norms(self) -> tuple[float, float]:
        """Return the Frobenius norms of what this layer's own increment adds, and of W_base.

        Under ZeRO 3 all processes must call it together.
        """
        base = self._base[0].weight
        with whole(self.parts() if self.has_gains else [base, *self.factors()]):
            square = self.increment_square()
            size = torch.linalg.vector_norm(base, dtype=torch.promote_types(base.dtype, torch.float32))
            return math.sqrt(float(square)), float(size)

    @property
    def has_gains(self) -> bool:
        """True if the increment has gains or a diagonal beside its low-rank part."""
        return any(self._parameters[name] is not None for name in FACTORS[2:])

    @torch.no_grad()
    def increment_square(self) -> Tensor:
        """Return |W_l - V|^2 (Frobenius), V what the increment is added to: a float64 scalar.

        Without gains it is |s B A|^2 = s^2 sum((B'B) * (A A')), for which the factors must be whole: nothing of size
        (O, I) is formed. With gains all of `parts` must be whole.
        """
        if self.has_gains:
            before, base = self._members[:-1], self._base[0].weight
            previous = compose(accumulate(base, [m.added() for m in before]), self.scale) if before else base
            return (self.weight.detach().double() - previous.double()).square().sum()
        b, a = self.increment_b.double(), self.increment_a.double()
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
    """The parts of one weight, by names in the model.

    Args:
        base: of W_base.
        added: of the `weight.Added` that follow, in turn; None for a gain that there is not.
        scale: s.
    """

    base: str
    added: list[tuple[str | None, ...]]
    scale: float

    def compose(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return the weight, (O, I).

        Args:
            read: returns the tensor of a name.
        """
        added = [Added(*(None if name is None else read(name) for name in names)) for names in self.added]  # type: ignore[arg-type]
        return compose(accumulate(read(self.base), added), self.scale)


def compositions(model: nn.Module) -> dict[str, Composition]:
    """Return name of a composed weight -> its parts, for all VLoRA layers of a model."""
    owners = {module: name for name, module in model.named_modules()}
    found = {}
    for name, layer in vlora_layers(model).items():
        added = [
            tuple(None if member._parameters[part] is None else f"{owners[member]}.{part}" for part in FACTORS)
            for member in layer._members
        ]
        found[f"{name}.weight"] = Composition(f"{owners[layer._base[0]]}.weight", added, layer.scale)
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
