"""The formula as it is written, from the stored parameters of a layer of any kind; nothing of the package computes."""

from typing import Any

import torch
from torch import Tensor

from glora_llm.schema.slots import BLOCK

SCALE = 1.5  # alpha / r of every slot that has a rank


def value(layer: Any, slot: str) -> Tensor | float:
    """Return a slot as scale * down @ up, or its one vector or scalar as a column; 0 for mode none."""
    modules = getattr(layer, f"slot_{slot}")
    if "default" not in modules:
        return 0.0
    stored = dict(modules["default"].named_parameters())
    for down, up in (("down", "up"), ("block_down", "block_up")):
        if down in stored:
            return SCALE * stored[down] @ stored[up]
    return next(iter(stored.values())).reshape(-1, 1)


def changes(layer: Any, w0: Tensor, composition: str) -> tuple[Tensor, Tensor]:
    """Return what the low-rank factors add to W0 (O, I), and what the other modes of A and B add."""
    spec = layer.path["default"]
    a, b = value(layer, "A"), value(layer, "B")
    if spec["A"].mode == "lora" and composition == "product":
        scaled = w0 @ a
    elif spec["A"].mode == "block":
        assert isinstance(a, Tensor)
        scaled = w0 * a.repeat_interleave(BLOCK, 1)
    else:
        scaled = w0 * a
    nothing = torch.zeros_like(w0)
    thin, thick = nothing, nothing
    for mode, part in ((spec["A"].mode, scaled), (spec["B"].mode, b + nothing)):
        if mode == "lora":
            thin = thin + part
        else:
            thick = thick + part
    return thin, thick


def bias_of(layer: Any, w0: Tensor, b0: Tensor | None) -> Tensor:
    """Return W0 C + D b0 + E + b0, (O)."""
    column = torch.zeros(len(w0), 1, dtype=w0.dtype) if b0 is None else b0[:, None]
    prompt = w0 @ (value(layer, "C") + w0.new_zeros(w0.shape[1], 1))
    return (prompt + value(layer, "D") * column + value(layer, "E") + column)[:, 0]


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a seeded sum of y's elements."""
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad(y, inputs, upstream))


def require_same(found: Tensor, wanted: Tensor, inputs: list[Tensor], what: object) -> None:
    """Compare two results and their gradients."""
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, msg=f"{what}: output")
    for place, (one, other) in enumerate(zip(gradients(found, inputs), gradients(wanted, inputs), strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=f"{what}: gradient {place}")
