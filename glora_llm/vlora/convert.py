"""From a dense model to VLoRA and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.vlora.compound import lay_out_compounds, put, share_linears
from glora_llm.vlora.config import VLoRAConfig
from glora_llm.vlora.layer import VLoRALinear, vlora_layers
from glora_llm.vlora.partitioned import whole


@dataclass(frozen=True)
class IncrementFit:
    """The error of an increment of rank r against the difference that it approximates.

    Args:
        layer: number of the layer, from 0.
        linear: its name inside the layer.
        rank: r.
        increment_error: |D - s B A| / |D| (Frobenius), D the difference that remained; 0 where D is zero.
        weight_error: |D - s B A| / |W_l|: the error of the whole weight.
    """

    layer: int
    linear: str
    rank: int
    increment_error: float
    weight_error: float


@torch.no_grad()
def from_dense(
    model: nn.Module, layers: Sequence[nn.Module], config: VLoRAConfig, base: str = "first"
) -> list[IncrementFit]:
    """Turn a dense model into VLoRA, in place, with increments by truncated SVD instead of a new start.

    s B_l A_l is the best rank-r approximation of D_l = W_l - V, where V is what the increment is added to: in a chain
    the previous layer's weight as it is now, truncated and rounded, so that errors do not add up; in a star the base.
    With r = min(O, I) the outputs stay the same to rounding. `config.start` plays no part, and gains stay without
    effect. One SVD a matrix, in float32 (float64 for a float64 model), on the device of the weights.

    Args:
        base: `first`: the weight of a compound's first layer; `mean`: the mean of all its layers' weights, which is
            nearer to each of them where they are alike, and needs increments of all layers.

    Returns:
        The error of the rank, for each linear of each layer that adds an increment.

    Raises:
        UserError: as `make_compounds`, or a mean that no layer could leave; nothing is changed then.
    """
    if base not in ("first", "mean"):
        raise UserError(f"base is '{base}'; expected first or mean.")
    if base == "mean" and config.increments != "all":
        raise UserError(
            "base is 'mean', and with increments 'next' the first layer of a compound would be that mean itself. Use "
            "increments='all'."
        )
    layout = lay_out_compounds(model, layers, config)
    fits: list[IncrementFit] = []
    for shared in layout.compounds():
        wanted: list[Tensor] = [linear.weight for linear in shared.linears]
        if base == "mean":
            mean = torch.zeros_like(wanted[0], dtype=_exact(wanted[0]))
            for weight in wanted:
                mean += weight.to(mean.dtype) / len(wanted)
            wanted[0] = wanted[0].clone()
            shared.linears[0].weight.copy_(mean)
        replaced, made = share_linears(shared, layout)
        skipped = len(shared.linears) - len(made)
        for number, weight, old, new in zip(shared.numbers[skipped:], wanted[skipped:], replaced, made, strict=True):
            errors = _fit(new, weight)
            put(model, old, new)
            fits.append(IncrementFit(number, shared.name, new.rank, *errors))
    return sorted(fits, key=lambda fit: fit.layer)


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _fit(made: VLoRALinear, target: Tensor) -> tuple[float, float]:
    """Set a layer's own increment so that its weight is near `target` (O, I); return the errors of `IncrementFit`."""
    made.increment_b.zero_()
    made.increment_a.zero_()  # the weight is now what the increment is added to
    dtype = _exact(target)
    difference = target.to(dtype) - made.weight.to(dtype)
    u, singular, v = torch.linalg.svd(difference, full_matrices=False)
    root = (singular[: made.rank] / made.scale).sqrt()
    made.increment_b.copy_(u[:, : made.rank] * root)
    made.increment_a.copy_(root[:, None] * v[: made.rank])
    lost, whole_difference, size = (
        float(torch.linalg.vector_norm(part))
        for part in (target.to(dtype) - made.weight.to(dtype), difference, target.to(dtype))
    )
    return lost / whole_difference if whole_difference else 0.0, lost / size if size else 0.0


@torch.no_grad()
def to_dense(model: nn.Module) -> nn.Module:
    """Write the weights out, in place: every VLoRALinear becomes a plain `nn.Linear` that holds its composed weight.

    The outputs are the same. What `save_pretrained` then writes is an ordinary checkpoint that loads without this
    package. Layers inside an adapter's wrapper are replaced there, so an adapter can be merged afterwards. Parameters
    are new ones: make the optimizer anew. Under ZeRO 3 all processes must call it together, and the model must leave
    DeepSpeed.

    Returns:
        The model.
    """
    for layer in vlora_layers(model).values():
        put(model, layer, layer.dense())
    return model


@dataclass(frozen=True)
class Increment:
    """The size of one increment: what the M step of the paper adds between two layers.

    Args:
        norm: |W_l - V|, Frobenius, V what it is added to: |s B_l A_l| where there are no gains.
        share: norm / |W_base|; infinite where the base is zero and the increment is not.
    """

    norm: float
    share: float


@torch.no_grad()
def m_steps(layers: Sequence[nn.Module]) -> dict[int, float]:
    """Return layer -> sqrt of the sum of |W_l - V|^2 over its linears, for layers that add increments: for a log.

    V is what the increment is added to. Without gains that is |s B A|^2, r x r products alone. Under ZeRO 3 the
    increments are gathered at once, the bases only where there are gains, and all processes must call it together.
    """
    squares: dict[int, list[Tensor]] = {}
    stacks = [(number, linear) for number, layer in enumerate(layers) for linear in vlora_layers(layer).values()]
    plain = [(number, linear) for number, linear in stacks if not linear.has_gains]
    with whole(factor for _, linear in plain for factor in linear.factors()):
        for number, linear in plain:
            squares.setdefault(number, []).append(linear.increment_square())
    for number, linear in stacks:
        if linear.has_gains:
            with whole(linear.parts()):
                squares.setdefault(number, []).append(linear.increment_square())
    if not squares:
        return {}
    numbers = sorted(squares)
    sizes = torch.stack([torch.stack(squares[number]).sum() for number in numbers]).sqrt()
    return dict(zip(numbers, sizes.tolist(), strict=True))


def increments(model: nn.Module) -> dict[str, Increment]:
    """Return name -> size of every increment of a model, for a log; names are those of `model.named_modules()`.

    Under ZeRO 3 all processes must call it together.
    """
    found = {}
    for name, layer in vlora_layers(model).items():
        norm, base = layer.increment_norms()
        found[name] = Increment(norm, norm / base if base else (float("inf") if norm else 0.0))
    return found
