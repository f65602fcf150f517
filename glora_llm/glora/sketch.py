"""Thin sketches of the loss's gradient by each weight: its leading singular vectors without the gradient itself.

Letters: T tokens, O out_features, I in_features, k and l columns of the test matrices, r rank.

Of a linear with input x (T, I) and gradient dy (T, O) at its output, the gradient by the weight is G = dy' x (O, I),
summed over all batches. Two random test matrices, W (I, k) and V (O, l), are multiplied with it as it passes by:

    Y = G W = dy' (x W)   (O, k)             Z = V' G = (dy V)' x   (l, I)

and G is about Q (V' Q)^+ Z with Q an orthonormal basis of Y's columns: the one-pass randomised SVD of Tropp, Yurtsever,
Udell and Cevher (arXiv 1609.00048, algorithm 4), good to the energy behind the first k singular values. Only thin
products are computed and nothing of size (O, I) is kept, so this is the same on a base in 4 bits, and sums over batches
and processes are sums of Y and Z.

Slot A in product form sees W0' G (I, I). Its sketch takes W0 no further times: Y_A = W0' Y, once at the end, and
Z_A = (dy (W0 V_A))' x with W0 V_A computed once at the start.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_llm.glora.frozen_weight import compute_dtype, dense_weight
from glora_llm.glora.layer import GLoRALinear

OVERSAMPLED = 6  # columns beyond the largest rank
Around = Callable[[Any], Any]  # a layer -> a context in which its weight is whole


class Directions(NamedTuple):
    """Leading singular vectors of a matrix: about left @ diag(values) @ right."""

    left: Tensor  # (rows, k)
    values: Tensor  # (k), falling
    right: Tensor  # (k, columns)


@dataclass
class Sketch:
    """Sums over the tokens of a batch, of one layer; sums of sketches are sketches of the sums.

    Attributes:
        y: G W, (O, k).
        z: V' G, (l, I).
        z_a: V_A' W0' G, (l, I).
        total: sum of dy, (O): the gradient by the bias.
        gains: sum of dy * (W0 x), (O): by gains of the outputs.
        shifts: sum of dy times sum(x), (O): by shifts of all inputs alike.
        squares: sums of squares of these three in each token, (3, O).
        inputs: sum of x squared, (I).
        tokens: their number, (1).
    """

    y: Tensor
    z: Tensor
    z_a: Tensor
    total: Tensor
    gains: Tensor
    shifts: Tensor
    squares: Tensor
    inputs: Tensor
    tokens: Tensor

    def tensors(self) -> list[Tensor]:
        """Return all sums, in a fixed order."""
        return list(vars(self).values())

    def add(self, other: "Sketch") -> None:
        """Add another sketch of the same layer, in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.add_(theirs)

    def plus(self, other: "Sketch") -> "Sketch":
        """Return the sum of two sketches."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Sketch(*(mine + theirs for mine, theirs in pairs))


class Tests(NamedTuple):
    """The test matrices of one layer."""

    w: Tensor  # (I, k)
    v: Tensor  # (O, l)
    v_a: Tensor  # (I, l)
    through: Tensor  # W0 V_A, (O, l)


class Probe:
    """Collects sketches of all layers of a model, of as many parts of the rows as are asked for.

    Args:
        layers: linears with a GLoRA adapter that changes nothing, by name.
        rank: largest rank that is asked of the sketches.
        seed: of the test matrices, which are the same on all processes.
        around: gives a layer's weight whole, for ZeRO 3.
        parts: sketches of each layer that are kept apart.

    Attributes:
        sums: a sketch of each part, by layer.
        biases: the frozen bias of each layer in float32 (O), or None.
    """

    def __init__(self, layers: Mapping[str, GLoRALinear], rank: int, seed: int, around: Around, parts: int = 2):
        self.layers, self.around = dict(layers), around
        columns = rank + OVERSAMPLED
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: dict[tuple[int, int], Tensor] = {}
        self.biases: dict[str, Tensor | None] = {}
        self.tests = {name: self._tests(name, layer, columns, 2 * columns + 1) for name, layer in self.layers.items()}
        self.sums = {name: [_empty(self.tests[name]) for _ in range(parts)] for name in self.layers}

    @torch.no_grad()
    def _tests(self, name: str, layer: GLoRALinear, k: int, el: int) -> Tests:
        with self.weight(layer) as w0:
            device, bias = w0.device, layer.b0
            self.biases[name] = None if bias is None else bias.detach().float().clone()
            w, v, v_a = (
                self._draw(rows, columns).to(device)
                for rows, columns in ((layer.in_features, k), (layer.out_features, el), (layer.in_features, el))
            )
            return Tests(w, v, v_a, w0 @ v_a)

    def _draw(self, rows: int, columns: int) -> Tensor:
        """Return a Gaussian test matrix: one for each shape."""
        if (rows, columns) not in self._drawn:
            self._drawn[rows, columns] = torch.randn(rows, columns, generator=self._generator)
        return self._drawn[rows, columns]

    @contextmanager
    def weight(self, layer: GLoRALinear) -> Iterator[Tensor]:
        """Give W0 (O, I) in float32; under ZeRO 3 all processes ask together."""
        base = layer.get_base_layer()
        with self.around(base):
            yield dense_weight(base, compute_dtype(base)).float()

    def see(self, loss: Callable[[], Tensor], part: int | None) -> None:
        """Add the sketches of one batch.

        Args:
            loss: runs the model forward and returns its summed loss, with a graph. Nobody's `.grad` is touched.
            part: which sums they are added to; None: to none.
        """
        probes: list[Tensor] = []

        def watch(name: str) -> Callable[..., Tensor]:
            def hook(layer: Any, inputs: Sequence[Tensor], y: Tensor) -> Tensor:
                probes.append(torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True))
                x, output = inputs[0].detach(), y.detach()
                y = y + probes[-1]  # has a gradient, whatever is trained
                y.register_hook(lambda dy: self._add(name, part, x, output, dy.detach()))
                return y

            return hook

        handles = [layer.register_forward_hook(watch(name), prepend=True) for name, layer in self.layers.items()]
        try:
            with torch.enable_grad():
                torch.autograd.grad(loss(), probes)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _add(self, name: str, part: int | None, x: Tensor, y: Tensor, dy: Tensor) -> None:
        if part is None:
            return
        x, y, dy = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (x, y, dy))
        bias = self.biases[name]
        self.sums[name][part].add(sketch_of(self.tests[name], x, y if bias is None else y - bias, dy))

    @torch.no_grad()
    def sum_over(self, reduce: Callable[[Tensor], Any]) -> None:
        """Add the sums of all processes, in place.

        Args:
            reduce: adds a tensor of all processes into it.
        """
        for sums in self.sums.values():
            for sketch in sums:
                for tensor in sketch.tensors():
                    reduce(tensor)

    def directions(self, name: str, sketch: Sketch) -> Directions:
        """Return the leading singular vectors of G: of slot B."""
        return leading(sketch.y, sketch.z, self.tests[name].v)

    def directions_through(self, name: str, sketch: Sketch, w0: Tensor) -> Directions:
        """Return those of W0' G: of slot A in product form."""
        return leading(w0.t() @ sketch.y.to(w0.dtype), sketch.z_a, self.tests[name].v_a)


def sketch_of(tests: Tests, x: Tensor, y: Tensor, dy: Tensor) -> Sketch:
    """Return the sketch of one batch.

    Args:
        x: (T, I).
        y: W0 x, (T, O).
        dy: (T, O).
    """
    sums = x.sum(1, keepdim=True)
    by_gain, by_shift = dy * y, dy * sums
    return Sketch(
        y=dy.t() @ (x @ tests.w),
        z=(dy @ tests.v).t() @ x,
        z_a=(dy @ tests.through).t() @ x,
        total=dy.sum(0),
        gains=by_gain.sum(0),
        shifts=by_shift.sum(0),
        squares=torch.stack([dy.square().sum(0), by_gain.square().sum(0), by_shift.square().sum(0)]),
        inputs=x.square().sum(0),
        tokens=x.new_tensor([len(x)]),
    )


def _empty(tests: Tests) -> Sketch:
    (inputs, k), (outputs, el) = tests.w.shape, tests.v.shape
    shapes = [
        (outputs, k),
        (el, inputs),
        (el, inputs),
        (outputs,),
        (outputs,),
        (outputs,),
        (3, outputs),
        (inputs,),
        (1,),
    ]
    return Sketch(*(tests.w.new_zeros(shape) for shape in shapes))


@torch.no_grad()
def leading(y: Tensor, z: Tensor, v: Tensor) -> Directions:
    """Return the leading singular vectors of a matrix M from Y = M W (rows, k) and Z = V' M (l, columns).

    In float64 on the CPU, so that all machines find the same; they come back to Y's device.

    Args:
        v: V, (rows, l); l is above k.
    """
    device = y.device
    y, z, v = (tensor.to("cpu", torch.float64) for tensor in (y, z, v))
    basis = torch.linalg.qr(y).Q  # (rows, k); fewer where there are fewer rows
    core = torch.linalg.lstsq(v.t() @ basis, z).solution  # (k, columns)
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    return Directions((basis @ left).to(device), values.to(device), right.to(device))
