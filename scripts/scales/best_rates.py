"""The best learning rate of a form, by the losses at some rates."""

import math

TOLERANCE = 0.07  # nats: losses that are as good as the smallest; chance makes half of that between neighbouring rates
Losses = dict[float, float]  # rate -> validation loss, nats a target; infinite where the run diverged


def best_rate(found: Losses) -> tuple[float, bool]:
    """Return the middle, over log(rate), of the rates that are as good as the best, and whether more rates are needed.

    As good are those from the first to the last at which the loss, linear between two rates, is within TOLERANCE of the
    smallest. More are needed where the lowest or the highest rate is among them, if what follows it is not divergence.
    """
    rates = [rate for rate, loss in found.items() if math.isfinite(loss)]
    if not rates:
        return math.nan, True
    bar = min(found[rate] for rate in rates) + TOLERANCE
    good = [place for place, rate in enumerate(rates) if found[rate] <= bar]
    low = _crossing(rates[good[0]], rates[good[0] - 1] if good[0] else None, found, bar)
    high = _crossing(rates[good[-1]], rates[good[-1] + 1] if good[-1] + 1 < len(rates) else None, found, bar)
    is_open = good[-1] == len(rates) - 1 and math.isfinite(list(found.values())[-1])
    return math.sqrt(low * high), good[0] == 0 or is_open


def _crossing(good: float, bad: float | None, found: Losses, bar: float) -> float:
    """Return the rate between a good and a bad one at which the loss meets the bar; the good one if there is no bad."""
    if bad is None:
        return good
    share = (bar - found[good]) / (found[bad] - found[good])
    return good * (bad / good) ** share


def finer(found: Losses) -> list[str]:
    """Return the rates that --refine adds: a quarter of the lowest and four times the highest, where it is as good as
    the best."""
    rates = [rate for rate, loss in found.items() if math.isfinite(loss)]
    bar = min((found[rate] for rate in rates), default=0.0) + TOLERANCE
    wanted = [rates[0] / 4] if rates and found[rates[0]] <= bar else []
    wanted += [rates[-1] * 4] if rates and found[rates[-1]] <= bar and rates[-1] == max(found) else []
    return [f"{rate:.3g}" for rate in wanted]
