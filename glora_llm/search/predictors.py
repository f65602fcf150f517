"""Predictors of what a slot of a layer is worth, from gradients of a few hundred records at the base's weights.

Each is a function of one layer's gradients and a choice; a structure is the choice of the largest sum of scores within
the budget. Which of them predicts the end of a training is found by experiment (`scripts/bench_frontier.py`).

Letters: G the gradient by the weight (O, I), W0' G that by A (I, I), s_k, u_k, v_k their singular values and vectors;
f the factor of a slot in even scaling, so that a step of the rate changes the output alike; g a vector's gradient.

- `first_step`: by how much the first step of Adam lowers the loss, with `up` along v_k: f sum_k s_k |u_k|_1 for a
  product of rank r, f |g|_1 for a vector.
- `energy`: the squared gradient that a slot can follow, f^2 sum_k s_k^2 or f^2 |g|^2: the rate at which gradient flow
  lowers the loss at first.
- `curvature`: by how much the best step of a second-order model does, whose curvature is the empirical Fisher matrix's
  diagonal: sum of g^2 / F - 1 over directions and entries, where pure noise gives 0. The F of a direction takes inputs
  and output gradients for independent, as K-FAC does (arXiv 1503.05671).
- `agreement`: `first_step` from one half of the records, judged by the gradient of the other half: only directions that
  both halves agree on count.
- `uniform` reads no gradients (`budget.uniform`); it is the one to beat.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from glora_llm.glora.path import SlotSpec
from glora_llm.glora.sketch import Directions
from glora_llm.registry import Registry
from glora_llm.search.space import Space

DIGITS = 5  # of a score: sums over processes differ in the last bits


@dataclass(frozen=True)
class Gradients:
    """Of one layer, of some of the records; float64 on the CPU.

    Args:
        low: A, B -> leading singular vectors of the gradient.
        noise: A, B -> sum over the tokens of the squared gradient along each of these, (k).
        vectors: slot -> gradient by a vector in that slot.
        vector_noise: slot -> sum over the tokens of its squares.
    """

    low: Mapping[str, Directions]
    noise: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor]
    vector_noise: Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerGradients:
    """Of one layer: of all records, or of two halves of them, as the predictor reads (`OF_HALVES`).

    Args:
        parts: of all, or of each half.
        factors: slot -> mode -> factor of the slot in even scaling.
    """

    parts: tuple[Gradients, ...]
    factors: Mapping[str, Mapping[str, float]]

    @property
    def whole(self) -> Gradients:
        """Those of all records."""
        (found,) = self.parts
        return found

    def factor(self, slot: str, mode: str) -> float:
        """Return the factor of a slot."""
        return self.factors.get(slot, {}).get(mode, 1.0)


Predictor = Callable[[LayerGradients, str, SlotSpec], float]
OF_HALVES = ("agreement",)  # predictors that read each half; the others read all records at once
PREDICTORS: Registry[Predictor] = Registry("predictor")


def scores(space: Space, layers: Mapping[str, LayerGradients], predictor: Predictor) -> NDArray[np.float64]:
    """Return the score of each choice of each gene, (G, C); 0 of mode none and where a gene has fewer choices."""
    found = np.zeros(space.parameters.shape)
    for row, gene in enumerate(space.genes):
        layer = layers[space.layers[gene.layer].name]
        for column, spec in enumerate(gene.specs):
            if spec.mode != "none":
                found[row, column] = float(f"{predictor(layer, gene.slot, spec):.{DIGITS}g}")
    return found


@PREDICTORS.register("first_step")
def first_step(layer: LayerGradients, slot: str, spec: SlotSpec) -> float:
    """Return the fall of the loss in Adam's first step, in units of the rate."""
    if _is_product(slot, spec):
        low = layer.whole.low[slot]
        gains = low.values * low.left.abs().sum(0)
        return layer.factor(slot, spec.mode) * float(gains[: spec.rank].sum())
    return layer.factor(slot, spec.mode) * float(_entries(layer.whole.vectors[slot], spec).abs().sum())


@PREDICTORS.register("energy")
def energy(layer: LayerGradients, slot: str, spec: SlotSpec) -> float:
    """Return the squared gradient that the slot can follow, in units of even scaling."""
    if _is_product(slot, spec):
        squares = layer.whole.low[slot].values[: spec.rank].square()
    else:
        squares = _entries(layer.whole.vectors[slot], spec).square()
    return layer.factor(slot, spec.mode) ** 2 * float(squares.sum())


@PREDICTORS.register("curvature")
def curvature(layer: LayerGradients, slot: str, spec: SlotSpec) -> float:
    """Return twice the fall of the loss by the best step of a diagonal second-order model, without that of noise."""
    if _is_product(slot, spec):
        squares, noise = layer.whole.low[slot].values[: spec.rank].square(), layer.whole.noise[slot][: spec.rank]
        return float((squares / noise.clamp_min(1e-300) - 1).clamp_min(0).sum())
    gradient, noise = _entries(layer.whole.vectors[slot], spec), _entries(layer.whole.vector_noise[slot], spec)
    return max(0.0, float((gradient.square() / noise.clamp_min(1e-300) - 1).sum()))


@PREDICTORS.register("agreement")
def agreement(layer: LayerGradients, slot: str, spec: SlotSpec) -> float:
    """Return the fall of the loss on one half of the records by Adam's first step on the other half."""
    total = 0.0
    for mine, theirs in (layer.parts, layer.parts[::-1]):
        if _is_product(slot, spec):
            gains = judged(mine.low[slot], theirs.low[slot])[: spec.rank]
            total += float(gains.clamp_min(0).sum())
        else:
            step = _entries(mine.vectors[slot], spec).sign()
            total += max(0.0, float(step @ _entries(theirs.vectors[slot], spec)))
    return layer.factor(slot, spec.mode) * total


def judged(mine: Directions, theirs: Directions) -> Tensor:
    """Return sign(u_k)' M v_k of each of my directions for their matrix M, (k)."""
    along = theirs.left @ (theirs.values[:, None] * (theirs.right @ mine.right.t()))  # M v_k, (rows, k)
    return (mine.left.sign() * along).sum(0)


def _is_product(slot: str, spec: SlotSpec) -> bool:
    return spec.mode == "lora" and slot != "C"


def _entries(values: Tensor, spec: SlotSpec) -> Tensor:
    return values.sum()[None] if spec.mode == "scalar" else values
