"""Predictors of what a slot of a layer is worth, from gradients of a few hundred records.

Each is a function of one layer's gradients and a choice; a structure is the choice of the largest sum of scores within
the budget. Which of them predicts the end of a training is found by experiment (`scripts/bench_frontier.py`).

Letters: G the gradient by the weight (O, I), W0' G that by A (I, I), s_k, u_k, v_k their singular values and vectors;
f the factor of a slot in even scaling at alpha 1, so that a step of the rate changes the output alike; g a vector's
gradient. A product of rank r has its leading r directions; `scores` sums what each of them is worth.

The score of a slot is the sum over its directions, each at the full alpha; in training they share alpha, and the slots
of a layer share its step, so the sum ranks structures and is not what one step does. Thin sketches enlarge the singular
values of noise, which `first_step` and `energy` take for signal; the two predictors of halves do not.

- `first_step`: by how much the first step of Adam lowers the loss, with `up` along v_k: f s_k |u_k|_1 of a direction,
  f |g|_1 of a vector.
- `energy`: the squared gradient that a slot can follow, f^2 s_k^2 or f^2 |g|^2: the rate at which gradient flow lowers
  the loss at first.
- `curvature`: by how much the best step of a second-order model does, whose curvature is the empirical Fisher matrix's
  diagonal: the sum of g^2 / F over directions and entries, with one g of one half of the records and the other g of
  the other half, so that noise is worth nothing: a floor for it would have to know how a sketch enlarges noise.
  The F of a direction takes inputs and output gradients for independent, as K-FAC does (arXiv 1503.05671), and tokens
  too, which those of one sample are not.
- `agreement`: `first_step` from one half of the records, judged by the gradient of the other half. What the halves do
  not agree on has mean zero, so noise is worth nothing, whatever its size.
- `short_run`: `first_step` of the mean gradient along a short run, in which the structure of `uniform` is trained at
  the run's rate and then thrown away: the fall of the loss if every step of it went along that mean. What the first
  steps put right, or turn round, cancels out; what goes on pulling adds up, and noise falls with the number of steps.
- `uniform` reads no gradients (`budget.uniform`); it is the one to beat.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from glora_llm.glora.sketch import Directions
from glora_llm.registry import Registry
from glora_llm.search.space import Space

DIGITS = 5  # of a score: sums over processes differ in the last bits


@dataclass(frozen=True)
class Gradients:
    """Of one layer, of some of the records; float64 on the CPU.

    Args:
        low: A, B -> leading singular vectors of the gradient.
        vectors: slot -> gradient by a vector in that slot.
        noise: A, B -> sum over the tokens of the squared gradient along each direction of `low`, (k); for `curvature`.
        vector_noise: slot -> sum over the tokens of the squares of `vectors`; for `curvature`.
    """

    low: Mapping[str, Directions]
    vectors: Mapping[str, Tensor]
    noise: Mapping[str, Tensor]
    vector_noise: Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerGradients:
    """Of one layer: of all records, or of two halves of them, as the predictor reads (`OF_HALVES`).

    Args:
        parts: of all, or of each half.
        factors: slot -> mode -> factor of the slot at alpha 1.
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


Predictor = Callable[[LayerGradients, str, str], Tensor]  # (layer, slot, mode) -> worth of each direction, or (1)
OF_HALVES = ("agreement", "curvature")  # predictors that read each half; the others read all records at once
OF_COURSE = ("short_run",)  # those that read gradients along a short run; the others at the base's weights
OF_NOISE = ("curvature",)  # those that read squares in each token
PREDICTORS: Registry[Predictor] = Registry("predictor")


def scores(space: Space, layers: Mapping[str, LayerGradients], predictor: Predictor) -> NDArray[np.float64]:
    """Return the score of each choice of each gene, (G, C); 0 of mode none and where a gene has fewer choices."""
    found = np.zeros(space.parameters.shape)
    for row, gene in enumerate(space.genes):
        layer = layers[space.layers[gene.layer].name]
        worth = {
            mode: predictor(layer, gene.slot, mode).cumsum(0).tolist()
            for mode in dict.fromkeys(spec.mode for spec in gene.specs if spec.mode != "none")
        }
        for column, spec in enumerate(gene.specs):
            if spec.mode != "none":
                count = spec.rank if _is_product(gene.slot, spec.mode) else 1
                found[row, column] = float(f"{worth[spec.mode][min(count, len(worth[spec.mode])) - 1]:.{DIGITS}g}")
    return found


@PREDICTORS.register("first_step")
def first_step(layer: LayerGradients, slot: str, mode: str) -> Tensor:
    """Return the fall of the loss in Adam's first step, in units of the rate."""
    if _is_product(slot, mode):
        low = layer.whole.low[slot]
        return layer.factor(slot, mode) * low.values * low.left.abs().sum(0)
    return layer.factor(slot, mode) * _entries(layer.whole.vectors[slot], mode).abs().sum(0, keepdim=True)


@PREDICTORS.register("short_run")
def short_run(layer: LayerGradients, slot: str, mode: str) -> Tensor:
    """Return the fall of the loss along a short run whose every step goes along the mean gradient."""
    return first_step(layer, slot, mode)


@PREDICTORS.register("energy")
def energy(layer: LayerGradients, slot: str, mode: str) -> Tensor:
    """Return the squared gradient that the slot can follow, in units of even scaling."""
    if _is_product(slot, mode):
        squares = layer.whole.low[slot].values.square()
    else:
        squares = _entries(layer.whole.vectors[slot], mode).square().sum(0, keepdim=True)
    return layer.factor(slot, mode) ** 2 * squares


@PREDICTORS.register("curvature")
def curvature(layer: LayerGradients, slot: str, mode: str) -> Tensor:
    """Return twice the fall of the loss by the best step of a diagonal second-order model, without that of noise."""
    found = []
    for mine, theirs in (layer.parts, layer.parts[::-1]):
        if _is_product(slot, mode):
            low = mine.low[slot]
            squares, noise = low.values * (low.left * along(low, theirs.low[slot])).sum(0), mine.noise[slot]
        else:
            squares = _entries(mine.vectors[slot], mode) * _entries(theirs.vectors[slot], mode)
            noise = _entries(mine.vector_noise[slot], mode)
        worth = squares / noise.clamp_min(1e-300)
        found.append(worth if _is_product(slot, mode) else worth.sum(0, keepdim=True))
    return found[0] + found[1]


@PREDICTORS.register("agreement")
def agreement(layer: LayerGradients, slot: str, mode: str) -> Tensor:
    """Return the fall of the loss on one half of the records by Adam's first step on the other half."""
    found = []
    for mine, theirs in (layer.parts, layer.parts[::-1]):
        if _is_product(slot, mode):
            found.append(judged(mine.low[slot], theirs.low[slot]))
        else:
            step = _entries(mine.vectors[slot], mode).sign()
            found.append((step * _entries(theirs.vectors[slot], mode)).sum(0, keepdim=True))
    return layer.factor(slot, mode) * (found[0] + found[1])


def judged(mine: Directions, theirs: Directions) -> Tensor:
    """Return sign(u_k)' M v_k of each of my directions for their matrix M, (k)."""
    return (mine.left.sign() * along(mine, theirs)).sum(0)


def along(mine: Directions, theirs: Directions) -> Tensor:
    """Return M v_k of each of my directions for their matrix M, (rows, k)."""
    return theirs.left @ (theirs.values[:, None] * (theirs.right @ mine.right.t()))


def _is_product(slot: str, mode: str) -> bool:
    return mode == "lora" and slot != "C"


def _entries(values: Tensor, mode: str) -> Tensor:
    return values.sum()[None] if mode == "scalar" else values
