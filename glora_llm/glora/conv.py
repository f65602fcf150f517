"""GLoRA on a convolution: the slots act on the unfolded weight.

Letters: O output channels, I = I_c k the values under the kernel (I_c input channels of a group, k the places of the
kernel), P output positions, r rank.

A convolution multiplies its unfolded weight W0, (O, I), with each column of `unfold(x)`, (I, P). So GLoRA's formula
(arXiv 2306.07967, equation 3) is, with all matrices of these shapes,

    f(x) = (W0 + W0 A + B) unfold(x) + (W0 C + D b0 + E + b0) 1'          = conv(x; W0 + W0 A + B) + a bias a channel

- W0 A is the matrix product of the unfolded weight with A = A_d A_u, (I, r)(r, I); `hadamard` multiplies W0 by
  A_d A_u, (O, r)(r, I), element by element.
- C, (I), is a constant value under the kernel. W0 C is a bias of each output channel, alike at all positions: also
  where the kernel reaches into the padding, which stays zero. That is what the merged convolution computes.
- Stride, padding (also `same` and other modes than zeros) and dilation are the base's: they choose the columns.
- With g groups, the O / g rows of a group meet the unfolded input of that group alone. A, B's B_u and C have the I of
  one group, and are shared by the groups; B_d and vectors have a row for each output channel.

There are two exact ways to compute it, and the cheaper one is taken. Low-rank A and B as W0 A_d A_u + B_d B_u, of rank
r_A + r_B: a convolution to so many channels and a 1 x 1 convolution. Or one convolution by the changed weight, whose
backward pass needs a product of W0's size more; `hadamard` and mode block always do that.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from glora_llm.glora.autograd import ReadWeight, with_prompt
from glora_llm.glora.block import block_factors, scaled_by_block
from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.linear import Slots, frozen_and_shifted_bias

# Thin products of r (I + O) numbers at each position take about twice the time of as many within one product of O x I;
# there are three of them (forward, for x, for the factors) against one more of the changed weight. Measured in
# docs/glora.md.
THIN_COST = 6
CONVOLVE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


class Geometry(NamedTuple):
    """Strides, padding, dilation and groups of a convolution: everything but its weight."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def dimensions(self) -> int:
        """Of the positions: 1, 2 or 3."""
        return len(self.kernel)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution of x (N, C, ...) with an unfolded weight (O, I)."""
        kernel = weight.unflatten(1, (-1, *self.kernel))
        return CONVOLVE[self.dimensions](x, kernel, bias, self.stride, self.padding, self.dilation, self.groups)

    def thin(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Return the convolution of x with down @ up, (O, r)(r, I), by r channels of each group."""
        channels = self.convolve(x, up.repeat(self.groups, 1))
        ones = (1,) * self.dimensions
        weight = down.reshape(*down.shape, *ones)
        return CONVOLVE[self.dimensions](channels, weight, groups=self.groups)

    def gradients(self, x: Tensor, weight: Tensor, dy: Tensor, wanted: tuple[bool, bool]) -> tuple[Any, Any]:
        """Return the gradients of x and of the weight (O, I), None where it is not wanted.

        Args:
            x: read for the gradient of the weight alone; else only its shape counts.
        """
        kernel = weight.unflatten(1, (-1, *self.kernel))
        zeros = [0] * self.dimensions
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy, x, kernel, None, self.stride, self.padding, self.dilation, False, zeros, self.groups, [*wanted, False]
        )
        return dx, None if dweight is None else dweight.flatten(1)


def geometry_of(layer: Any) -> tuple[Geometry, tuple[int, ...] | None]:
    """Return where the kernel of a convolution lies, and what is padded before it; None: its own zeros alone."""
    padded = isinstance(layer.padding, str) or layer.padding_mode != "zeros"
    padding = (0,) * len(layer.kernel_size) if padded else layer.padding
    geometry = Geometry(layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups)
    return geometry, tuple(layer._reversed_padding_repeated_twice) if padded else None


class Frozen(torch.autograd.Function):
    """conv(x; W0) + bias with a W0 that learns nothing: read anew in the backward pass, as x is not needed there."""

    @staticmethod
    def forward(ctx: Any, geometry: Geometry, read: ReadWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return (N, O, ...); the bias is (O)."""
        ctx.geometry, ctx.read, ctx.shape = geometry, read, x.shape
        return geometry.convolve(x, read(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        """Return the gradients of x and of the bias."""
        dx = dbias = None
        if ctx.needs_input_grad[2]:
            x = dy.new_empty(1).expand(ctx.shape)
            dx, _ = ctx.geometry.gradients(x, ctx.read(), dy, (True, False))
        if ctx.needs_input_grad[3]:
            dbias = dy.sum([0, *range(2, dy.dim())])
        return None, None, dx, dbias


class Through(torch.autograd.Function):
    """W0 M, (O, r), of a frozen W0 that is read anew in the backward pass: W0 A_d and W0 C."""

    @staticmethod
    def forward(ctx: Any, read: ReadWeight, matrix: Tensor) -> Tensor:
        """Return W0 M for M (I, r)."""
        ctx.read = read
        return read() @ matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        """Return W0' times the gradient, (I, r)."""
        return None, ctx.read().t() @ gradient


def glora_conv(
    x: Tensor, geometry: Geometry, read: ReadWeight, b0: Tensor | None, s: Slots, composition: str, dropped: Tensor
) -> Tensor:
    """Compute f(x).

    Args:
        x: (N, C, ...), padded already where the base pads otherwise than with zeros.
        read: returns W0 (O, I) in x's dtype.
        b0: the frozen bias (O), or None.
        s: in x's dtype.
        dropped: x after dropout: the input of the low-rank factors of A and B.

    Returns:
        (N, O, ...), in x's dtype.
    """
    rows, columns = read().shape
    bias = frozen_and_shifted_bias(b0, s, rows)
    bias = with_prompt(bias, None if s.c is None else Through.apply(read, s.c[:, None])[:, 0])
    ups, downs = _low_rank(read, s, composition)
    dense_a = s.a_down is not None and (s.a_blocks is not None or composition == "hadamard")
    thin_cost = THIN_COST * sum(map(len, ups)) * (geometry.groups * columns + rows)
    if dropped is x and (dense_a or rows * columns <= thin_cost):
        return geometry.convolve(x, _changed(read, s, ups, downs, dense_a), bias)
    y = Frozen.apply(geometry, read, x, bias if s.a_gain is None else None)
    if s.a_gain is not None:
        y = y * (1 + _channels(s.a_gain, geometry))
        y = y if bias is None else y + _channels(bias, geometry)
    if dense_a:  # the gains of mode block are no low-rank factors: dropout leaves them alone
        y = y + geometry.convolve(x if s.a_blocks is not None else dropped, _change_by_a(read, s))
    if ups:
        y = y + geometry.thin(dropped, torch.cat(ups), torch.cat(downs, 1))
    if s.b_shift is not None:  # b 1': adds b times the sum of what lies under the kernel
        y = y + geometry.thin(x, x.new_ones(1, columns), s.b_shift.expand(rows)[:, None])
    return y


def _low_rank(read: ReadWeight, s: Slots, composition: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the factors (r, I) and (O, r) of B, and of A as a product, whose second is W0 A_d."""
    ups, downs = [], []
    if s.b_down is not None and s.b_up is not None:
        ups, downs = [s.b_up], [s.b_scale * s.b_down]
    if s.a_down is not None and s.a_up is not None and composition == "product":
        ups.append(s.a_up)
        downs.append(s.a_scale * Through.apply(read, s.a_down))
    return ups, downs


def _changed(read: ReadWeight, s: Slots, ups: list[Tensor], downs: list[Tensor], dense_a: bool) -> Tensor:
    """Return W0 + W0 A + B, (O, I)."""
    weight = read()
    if s.a_gain is not None:
        weight = weight + s.a_gain[:, None] * read()
    if dense_a:
        weight = weight + _change_by_a(read, s)
    for up, down in zip(ups, downs, strict=True):
        weight = torch.addmm(weight, down, up)
    return weight if s.b_shift is None else weight + s.b_shift[:, None]


def _change_by_a(read: ReadWeight, s: Slots) -> Tensor:
    """Return what `hadamard` or mode block adds to W0, (O, I)."""
    assert s.a_down is not None
    if s.a_blocks is not None:
        return scaled_by_block(read(), block_factors(s.a_down, s.a_blocks, s.a_scale)) - read()
    assert s.a_up is not None
    return s.a_scale * read() * (s.a_down @ s.a_up)


def _channels(values: Tensor, geometry: Geometry) -> Tensor:
    """Return values (O) or (1) as a factor or summand of (N, O, ...)."""
    return values.reshape(-1, *(1,) * geometry.dimensions)


class GLoRAConv(GLoRALinear):
    """A frozen `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with GLoRA slots on its unfolded weight."""

    def _compute(self, x: Tensor, dropped: Tensor | None, adapter_name: str, read: Any) -> Tensor:
        dtype = x.dtype
        geometry, pads = geometry_of(self.base_layer)
        if x.dim() == geometry.dimensions + 1:  # one sample without its batch
            batch = None if dropped is None else dropped[None]
            return self._compute(x[None], batch, adapter_name, read)[0]
        b0 = None if self.b0 is None else self.b0.to(dtype)
        slots, composition = self.slots(adapter_name, read).to(dtype), self.composition[adapter_name]
        x = self._padded(x, pads)
        thin = x if dropped is None else self._padded(dropped, pads)
        return glora_conv(x, geometry, lambda: dense_weight(self.base_layer, dtype), b0, slots, composition, thin)

    def _padded(self, x: Tensor, pads: tuple[int, ...] | None) -> Tensor:
        if pads is None:
            return x
        mode = self.get_base_layer().padding_mode
        return nn.functional.pad(x, pads, mode="constant" if mode == "zeros" else mode)

    def output_gradients(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss's gradients by the unfolded weight, (O, I), and bias, (O), from those at the output."""
        geometry, pads = geometry_of(self.get_base_layer())
        weight = dense_weight(self.get_base_layer(), dy.dtype)
        _, dweight = geometry.gradients(self._padded(x.to(dy.dtype), pads), weight, dy, (False, True))
        return dweight, dy.sum([0, *range(2, dy.dim())])
