"""The two projections of a bottleneck adapter: dense matrices, or sums of Kronecker products (Compacter).

Each is a module of its own, called as one: under ZeRO 3 a call is what gathers its parameters.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class DenseProjection(nn.Module):
    """y = x W^T + b.

    Args:
        inputs, outputs: I and O of x (..., I) and y (..., O).
        to_zero: begin with W = 0, so that the adapter begins as the identity.
    """

    def __init__(self, inputs: int, outputs: int, to_zero: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if to_zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., O) in the dtype of x."""
        return linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class KroneckerRule(nn.Module):
    """The n matrices A_i (n, n) of all Kronecker products of a model: what its projections share.

    Args:
        count: n.
    """

    def __init__(self, count: int):
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(count, count, count) / count)

    def forward(self) -> Tensor:
        """Return a copy of A, (n, n, n): under ZeRO 3 the parameter itself is given away again after the call."""
        return self.matrices.clone()


class KroneckerProjection(nn.Module):
    """y = x H + b with H = sum over i of A_i (x) (s_i t_i), a parametrised hypercomplex multiplication.

    A_i is (n, n); s_i (I / n, k) and t_i (k, O / n) are the factors of a matrix of rank k (arXiv 2106.04647). H is
    never built: x is cut into n parts, each goes through the factors, and the A_i mix the parts.

    Args:
        inputs, outputs: I and O, multiples of n.
        count: n.
        rank: k.
        to_zero: begin with t = 0, so that the adapter begins as the identity.
        shared: the A_i are another module's, and are handed to each call; else they are trained here.
    """

    def __init__(self, inputs: int, outputs: int, count: int, rank: int, to_zero: bool, shared: bool):
        super().__init__()
        self.left = nn.Parameter(torch.empty(count, inputs // count, rank))
        self.right = nn.Parameter(torch.zeros(count, rank, outputs // count))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factor in (self.left,) if to_zero else (self.left, self.right):
            for matrix in factor.data:
                nn.init.xavier_uniform_(matrix)
        if not shared:
            self.rule = nn.Parameter(torch.randn(count, count, count) / count)

    def forward(self, x: Tensor, rule: Tensor | None = None) -> Tensor:
        """Return (..., O) in the dtype of x.

        Args:
            rule: the A_i (n, n, n), where they are shared.
        """
        rule = self.rule if rule is None else rule
        rule, left, right = (factor.to(x.dtype) for factor in (rule, self.left, self.right))
        parts = x.unflatten(-1, (rule.shape[1], -1))  # row a of A_i goes with part a of x
        narrow = torch.einsum("...ap,ipk->...aik", parts, left)
        mixed = torch.einsum("...aik,iab->...bik", narrow, rule)
        out: Tensor = torch.einsum("...bik,ikq->...bq", mixed, right)
        return out.flatten(-2) + self.bias.to(x.dtype)


def draw(module: nn.Module) -> None:
    """Give every parameter a small random value, as PEFT's `init_weights=False` does."""
    parameter: Any
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            nn.init.normal_(parameter, std=0.05)
