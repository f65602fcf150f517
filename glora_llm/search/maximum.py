"""Find the genome that a surrogate model predicts the highest score for, within a limit on its cost."""

import numpy as np

from glora_llm.search.space import Code, Space, chosen
from glora_llm.search.surrogate import ChoiceTable, Surrogate

TANGENTS = 20  # halvings of the range of summed importance
PRICES = 60  # halvings of the range of prices


def find_maximum(space: Space, surrogate: Surrogate, limit: float) -> Code:
    """Return a code of nearly the best predicted score within the limit.

    A parabola that opens downwards lies below each of its tangents, and along a tangent the score is a plain sum, which
    `_maximise_sum` can maximise. The best code of a tangent has the less of importance the further out the tangent
    touches; bisection finds the tangent that touches where its own best code is.
    """
    if surrogate.curve == 0:
        return _maximise_sum(space, surrogate.tangent(0.0), limit)
    is_choice = np.isfinite(surrogate.effects)
    low = float(np.where(is_choice, surrogate.importance, np.inf).min(1).sum())
    high = float(np.where(is_choice, surrogate.importance, -np.inf).max(1).sum())
    codes = []
    for _ in range(TANGENTS):
        middle = (low + high) / 2
        codes.append(_maximise_sum(space, surrogate.tangent(middle), limit))
        if surrogate.total_importance(codes[-1]) > middle:
            low = middle
        else:
            high = middle
    return max(codes, key=surrogate.predict)


def _maximise_sum(space: Space, effects: ChoiceTable, limit: float) -> Code:
    """Return a code of nearly the largest sum of effects within the limit, by a Lagrange multiplier.

    A price on the cost lets every gene choose by itself. The price is the lowest that keeps the limit; the rest of the
    limit is spent on the best single changes that still fit.
    """
    free = effects.argmax(1).astype(np.uint8)
    if space.cost(free) <= limit:
        return free
    low, high = 0.0, 1.0
    while space.cost(_best_at_price(space, effects, high)) > limit and high < 1e30:
        low, high = high, high * 4
    for _ in range(PRICES):
        middle = (low + high) / 2
        if space.cost(_best_at_price(space, effects, middle)) > limit:
            low = middle
        else:
            high = middle
    return _spend_rest(space, effects, _best_at_price(space, effects, high), limit)


def _best_at_price(space: Space, effects: ChoiceTable, price: float) -> Code:
    """Return the choice of each gene that is worth most after its cost is paid."""
    with np.errstate(invalid="ignore"):  # -inf - inf where a gene has fewer choices
        worth = np.where(np.isfinite(effects), effects - price * space.costs, -np.inf)
    return worth.argmax(1).astype(np.uint8)


def _spend_rest(space: Space, effects: ChoiceTable, code: Code, limit: float) -> Code:
    """Make the single change of the largest gain that still fits, until none does."""
    while True:
        gain = effects - chosen(effects, code)[:, None]
        extra_cost = space.costs - chosen(space.costs, code)[:, None]
        fits = (extra_cost <= limit - space.cost(code)) & (gain > 0)
        if not fits.any():
            return code
        gene, choice = np.unravel_index(np.where(fits, gain, -np.inf).argmax(), gain.shape)
        code[gene] = choice
