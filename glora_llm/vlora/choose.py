"""Choose the layers that share a base, and the ranks of their differences: the least loss under a budget of parameters.

What is minimised is the sum over all linears of all layers of what `group_losses` computes.
"""

from collections.abc import Callable, Sequence

from torch import nn

from glora_llm.vlora.group_losses import Candidate, LinearLosses
from glora_llm.vlora.group_search import Search
from glora_llm.vlora.groups import Calibration, UnequalSharing


def choose_groups(
    layers: Sequence[nn.Module],
    linears: Sequence[str],
    budget: float,
    measured: Calibration | None,
    tell: Callable[[str], object] | None = None,
) -> UnequalSharing:
    """Return the groups with the least loss whose parameters are at most a share of those of the dense linears.

    Losses are estimated at first (see `group_losses`), rather too low. While the best choice by what is known has
    groups that are estimated, these are decomposed; a choice without any is the best of all, unless the estimate of
    a group that it passed over is more than `DOUBT` too high.

    Args:
        layers: of a dense model, in order.
        linears: names inside a layer.
        budget: the share, above 0 and below 1.
        measured: of the linears' inputs and outputs; None: nothing is known about the weights (which may have no
            values), and all differ alike.
        tell: takes a line whenever a linear is done, and two at the end: together hundreds of decompositions, a
            minute on a CPU for 30 layers of width 576.

    Raises:
        UserError: when no groups come within the budget; it names the nearest.
    """
    known: dict[str, LinearLosses] = {}
    for name in linears:
        known[name] = LinearLosses(layers, name, measured)
        if tell is not None:
            tell(f"  {name}: {_counted(known[name].candidates)}")
    search = _search(known, len(layers), budget)
    closer = 0
    while True:
        chosen = search.best()
        estimated = [way.group for way in chosen if not way.group.exact]
        if not estimated:
            break
        for group in estimated:
            known[group.linear].decompose(group)
        closer += len(estimated)
    if tell is not None:
        tell(f"  {closer:,} groups more decomposed, which the best choice would have had by their estimates")
    if tell is not None and measured is not None and measured.gradients:
        rise = sum(way.loss for way in chosen) / 2
        tell(f"  estimated rise of the loss before any training: {rise:.3g} nats a token")
    return UnequalSharing(tuple(way.group.group(way.place) for way in chosen))


def require_budget(layers: Sequence[nn.Module], linears: Sequence[str], budget: float) -> None:
    """Check, by sizes alone, that some groups come within a budget; arguments are as of `choose_groups`.

    Raises:
        UserError: when none do; it names the nearest.
    """
    _search({name: LinearLosses(layers, name, None) for name in linears}, len(layers), budget)


def _search(known: dict[str, LinearLosses], layers: int, budget: float) -> Search:
    dense = layers * sum(one.full for one in known.values())
    return Search({name: one.candidates for name, one in known.items()}, layers, int(budget * dense), dense)


def _counted(candidates: Sequence[Candidate]) -> str:
    shared = [group for group in candidates if group.count > 1]
    ranks, exact = sum(len(group.ranks) for group in shared), sum(group.exact for group in shared)
    return f"{len(shared):,} groups at {ranks:,} ranks, {exact:,} decomposed and {len(shared) - exact:,} estimated"
