"""AdapterFusion's layer (arXiv 2005.00247): frozen bottleneck adapters side by side, and attention over their outputs.

Letters: N adapters, r their bottleneck, D the width of the hidden states.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from glora_llm.errors import UserError

FROZEN = ("down_weight", "down_bias", "up_weight", "up_bias")
DEVIATION = 0.02  # of the numbers that query and key begin with


class FrozenAdapters(nn.Module):
    """N bottleneck adapters of one shape, in buffers: they do not learn, and no ZeRO stage divides them.

    Args:
        count: N.
        rank: r.
        width: D.
    """

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor

    def __init__(self, count: int, rank: int, width: int):
        super().__init__()
        shapes = {"down_weight": (rank, width), "down_bias": (rank,), "up_weight": (width, rank), "up_bias": (width,)}
        for name in FROZEN:
            self.register_buffer(name, torch.zeros(count, *shapes[name]))

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take the adapters' tensors, in float32 whatever the base computes in; on a model without weights, check them.

        Raises:
            UserError: when one has another shape.
        """
        for name in FROZEN:
            here: Tensor = getattr(self, name)
            if tensors[name].shape != here.shape:
                raise UserError(
                    f"the adapters' {name} are {tuple(tensors[name].shape)}, and {tuple(here.shape)} fits this model: "
                    "they were trained on another base."
                )
            setattr(self, name, tensors[name].to(here.device))

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return U_n f(D_n x + d_n) + u_n of each adapter, (..., N, D), for x (..., D)."""
        down_weight, down_bias, up_weight, up_bias = (getattr(self, name).to(x.dtype) for name in FROZEN)
        narrow = activation(linear(x, down_weight.flatten(0, 1), down_bias.flatten()))
        narrow = narrow.unflatten(-1, down_bias.shape)
        return torch.einsum("...nr,ndr->...nd", narrow, up_weight) + up_bias


class FusionAttention(nn.Module):
    """The weighting of the adapters at one place: o = V sum over n of s_n z_n, s = softmax over n of (Q h)' (K z_n).

    h (D) is what the adapters are given and z_n (D) what adapter n gives; V begins as the identity, so the adapters
    begin as a weighted mean. As in the paper, the products are not divided by sqrt(D). The key has no bias: it would
    add the same number to the products of all n, which softmax takes away.

    Args:
        width: D.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(width, width) * DEVIATION)
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.key = nn.Parameter(torch.randn(width, width) * DEVIATION)
        self.value = nn.Parameter(torch.eye(width))

    def forward(self, hidden: Tensor, outputs: Tensor) -> Tensor:
        """Return o (..., D).

        Args:
            hidden: h, (..., D).
            outputs: z, (..., N, D).
        """
        dtype = hidden.dtype
        query = linear(hidden, self.query.to(dtype), self.query_bias.to(dtype))
        products = (outputs @ (query @ self.key.to(dtype)).unsqueeze(-1)).squeeze(-1)  # (K' Q h)' z_n
        shares = products.softmax(-1, torch.promote_types(dtype, torch.float32)).to(dtype)
        mixed = (shares.unsqueeze(-2) @ outputs).squeeze(-2)
        return linear(mixed, self.value.to(dtype))
