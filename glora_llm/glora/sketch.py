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

The products of a batch are in the dtype of the layer (bfloat16, else float32), the sums in float32, and the singular
vectors in float64: what rounding adds is far below what another draw of samples does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_llm.glora.frozen_weight import compute_dtype, dense_weight
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.shown import showing

OVERSAMPLED = 6  # columns beyond the largest rank
WIDER = 4  # V has so many times W's columns: the energy behind the sketch enters it by 1 / (WIDER - 1)
Around = Callable[[Any], Any]  # a layer -> a context in which its weight is whole


class Directions(NamedTuple):
    """Leading singular vectors of a matrix: about left @ diag(values) @ right."""

    left: Tensor  # (rows, k)
    values: Tensor  # (k), falling
    right: Tensor  # (k, columns)


class Reads(NamedTuple):
    """The sums that are kept beside Y, Z and that of dy."""

    through: bool = True  # Z_A: slot A in product form
    gains: bool = False  # the gradient by gains of the outputs: slot A as a vector or scalar
    shifts: bool = False  # by shifts of all inputs alike: slot B as a vector or scalar
    noise: bool = False  # squares in each token


# Sums over the tokens of a batch, of one layer, in float32; sums of sketches are sketches of the sums. By name:
#   y: W' G', (k, O); z: V' G, (l, I); z_a: V_A' W0' G, (l, I)
#   total: sum of dy, (O): the gradient by the bias; gains: sum of dy * (W0 x), (O); shifts: sum of dy sum(x), (O)
#   total2, gains2, shifts2: sums of squares of these in each token, (O); inputs2: of x, (I); tokens: their number, (1)
Sketch = dict[str, Tensor]


def plus(one: Sketch, other: Sketch) -> Sketch:
    """Return the sum of two sketches of the same layer."""
    return {name: one[name] + other[name] for name in one}


class RandomMatrices(NamedTuple):
    """The test matrices of one layer, in the dtype of the products."""

    w: Tensor  # (I, k)
    v: Tensor  # V (O, l), or V beside W0 V_A (O, 2 l)
    v_a: Tensor  # V_A (I, l)


class Probe:
    """Collects sketches of all layers of a model, of as many parts of the rows as are asked for.

    Args:
        layers: linears with a GLoRA adapter that changes nothing, by name.
        rank: largest rank that is asked of the sketches.
        seed: of the test matrices, which are the same on all processes.
        around: gives a layer's weight whole, for ZeRO 3.
        parts: sketches of each layer that are kept apart.
        reads: which sums are kept.

    Attributes:
        sums: a sketch of each part, by layer.
        biases: the frozen bias of each layer in float32 (O), or None.
    """

    def __init__(
        self,
        layers: Mapping[str, GLoRALinear],
        rank: int,
        seed: int,
        around: Around,
        parts: int = 2,
        reads: Reads = Reads(),  # noqa: B008 - immutable
    ):
        self.layers, self.around, self.parts, self.reads = dict(layers), around, parts, reads
        columns = rank + OVERSAMPLED
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: dict[tuple[int, int], Tensor] = {}
        self._shared: tuple[Tensor, Tensor, Tensor] | None = None  # the last input, cast, and its columns
        self.biases: dict[str, Tensor | None] = {}
        self.tests = {
            name: self._tests(name, layer, columns, WIDER * columns + 1) for name, layer in self.layers.items()
        }
        self.sums = {name: [_empty(self.tests[name], reads) for _ in range(parts)] for name in self.layers}

    @torch.no_grad()
    def _tests(self, name: str, layer: GLoRALinear, k: int, el: int) -> RandomMatrices:
        with self.weight(layer) as w0:
            device, bias = w0.device, layer.b0
            self.biases[name] = None if bias is None else bias.detach().float().clone()
            w, v, v_a = (
                self._draw(rows, columns).to(device)
                for rows, columns in ((layer.in_features, k), (layer.out_features, el), (layer.in_features, el))
            )
            if self.reads.through:
                v = torch.cat([v, w0 @ v_a], dim=1)
        dtype = torch.bfloat16 if compute_dtype(layer.get_base_layer()) is torch.bfloat16 else torch.float32
        return RandomMatrices(w.to(dtype), v.to(dtype), v_a.to(dtype))

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
        with self.watching(part) as anchor, torch.enable_grad():
            torch.autograd.grad(loss(), anchor, allow_unused=True)

    @contextmanager
    def watching(self, part: int | None, factor: float = 1.0) -> Iterator[Tensor]:
        """Add the sketches of every backward pass that is run in the context, by whoever runs it.

        Args:
            part: which sums they are added to; None: to none.
            factor: of the gradients; sums of squares must not be asked for then.

        Yields:
            a tensor that all outputs depend on, so that each has a gradient, whatever is trained.
        """

        def show(name: str, x: Tensor, y: Tensor | None, dy: Tensor) -> None:
            if part is not None:
                self._add(name, part, factor, x, y, dy)

        try:
            with showing(self.layers, show, self.reads.gains) as anchor:
                yield anchor
        finally:
            self._shared = None

    @torch.no_grad()
    def _add(self, name: str, part: int, factor: float, x: Tensor, y: Tensor | None, dy: Tensor) -> None:
        tests, bias = self.tests[name], self.biases[name]
        if self._shared is None or not _is_same(self._shared[0], x):  # q, k and v, and gate and up, have one input
            rows = x.detach().reshape(-1, x.shape[-1]).to(tests.w.dtype)
            self._shared = x, rows, columns_of(rows, tests.w, self.reads.shifts)
        _, rows, columns = self._shared
        outputs = None if y is None else y.reshape(-1, y.shape[-1]).float() - (0 if bias is None else bias)
        dy = dy.reshape(-1, dy.shape[-1]).to(rows.dtype)
        for key, value in sketch_of(tests, self.reads, rows, columns, dy, outputs).items():
            self.sums[name][part][key].add_(value, alpha=factor)

    @torch.no_grad()
    def sum_over(self, reduce: Callable[[Tensor], Any]) -> None:
        """Add the sums of all processes, in place.

        Args:
            reduce: adds a tensor of all processes into it.
        """
        for sums in self.sums.values():
            for sketch in sums:
                for tensor in sketch.values():
                    reduce(tensor)

    def directions(self, name: str, sketch: Sketch) -> Directions:
        """Return the leading singular vectors of G: of slot B."""
        tests = self.tests[name]
        return leading(sketch["y"].t(), sketch["z"], tests.v[:, : tests.v_a.shape[1]])

    def directions_through(self, name: str, sketch: Sketch, w0: Tensor) -> Directions:
        """Return those of W0' G: of slot A in product form."""
        return leading((sketch["y"] @ w0).t(), sketch["z_a"], self.tests[name].v_a)


def _is_same(kept: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are one in memory: as long as one is kept, nothing else is put there."""
    return kept.data_ptr() == other.data_ptr() and kept.shape == other.shape and kept.dtype == other.dtype


def columns_of(x: Tensor, w: Tensor, shifts: bool) -> Tensor:
    """Return what dy' is multiplied by, (T, k + 1): x W, a 1 for each token; and for shifts sum(x).

    Args:
        x: (T, I).
        w: W, (I, k).
    """
    more = [x.sum(1, keepdim=True)] if shifts else []
    return torch.cat([x @ w, torch.ones_like(x[:, :1]), *more], dim=1)


def sketch_of(
    tests: RandomMatrices, reads: Reads, x: Tensor, columns: Tensor, dy: Tensor, y: Tensor | None = None
) -> Sketch:
    """Return the sketch of one batch.

    Args:
        x: (T, I), in the dtype of the test matrices.
        columns: of `columns_of`.
        dy: (T, O), in the same dtype.
        y: W0 x, (T, O) in float32; of gains.
    """
    (k, el), products = (tests.w.shape[1], tests.v_a.shape[1]), (columns.t() @ dy).float()
    both = ((dy @ tests.v).t() @ x).float()
    found = {"y": products[:k], "z": both[:el], "total": products[k]}
    if reads.through:
        found["z_a"] = both[el:]
    if reads.shifts:
        found["shifts"] = products[k + 1]
    by_gain = dy.float() * y if y is not None else None
    if by_gain is not None:
        found["gains"] = by_gain.sum(0)
    if reads.noise:
        squares = dy.float().square()
        count = torch.full((1,), len(x), dtype=torch.float32, device=x.device)
        found |= {"total2": squares.sum(0), "inputs2": x.float().square().sum(0), "tokens": count}
        if by_gain is not None:
            found["gains2"] = by_gain.square().sum(0)
        if reads.shifts:
            found["shifts2"] = squares.t() @ columns[:, -1].float().square()
    return found


def _empty(tests: RandomMatrices, reads: Reads) -> Sketch:
    (inputs, k), outputs, el = tests.w.shape, tests.v.shape[0], tests.v_a.shape[1]
    shapes: dict[str, tuple[int, ...]] = {"y": (k, outputs), "z": (el, inputs), "total": (outputs,)}
    more: dict[str, dict[str, tuple[int, ...]]] = {
        "through": {"z_a": (el, inputs)},
        "gains": {"gains": (outputs,)},
        "shifts": {"shifts": (outputs,)},
    }
    shapes |= {name: shape for key, fields in more.items() if getattr(reads, key) for name, shape in fields.items()}
    if reads.noise:
        shapes |= {f"{name}2": (outputs,) for name in ("total", "gains", "shifts") if name in shapes}
        shapes |= {"inputs2": (inputs,), "tokens": (1,)}
    return {name: tests.w.new_zeros(shape, dtype=torch.float32) for name, shape in shapes.items()}


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
