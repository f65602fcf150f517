"""The rows of a comparison's table, from what its trials left, and the table as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from glora_llm.compare.budget import Fit
from glora_llm.compare.contenders import Contender
from glora_llm.compare.course import Setting
from glora_llm.compare.outcome import Outcome, rate_text
from glora_llm.compare.significance import LEVEL, PairedTest, corrected, over_rows, over_seeds, row_scores
from glora_llm.compare.trial import Result

WIDTH = 150  # columns of the table where there is no terminal


@dataclass
class Contest:
    """A method's part in a comparison.

    Attributes:
        contender: the method.
        fit: its knob and parameters; None where it does not fit the model.
        steps: of its runs.
        rates: that are tried.
        outcome: of its trials, once they have ended.
        stopped_at: step at which it was stopped in a race; None: it was not.
        why: it was not run; empty where it was.
        is_defect: a trial failed for no reason of the method's.
    """

    contender: Contender
    fit: Fit | None = None
    steps: int = 0
    rates: tuple[float, ...] = ()
    outcome: Outcome | None = None
    stopped_at: int | None = None
    why: str = ""
    is_defect: bool = False


def rows(contests: Sequence[Contest], setting: Setting) -> list[dict[str, Any]]:
    """Return a row a method, in the order of --methods; what is not known (yet) is None."""
    scored = [contest for contest in contests if contest.outcome and contest.outcome.finals and not contest.why]
    best = min(scored, key=lambda contest: setting.better(mean(_scores(contest, setting)), setting.score), default=None)
    targets = _targets(scored)
    found = [_row(contest, setting, best, targets) for contest in contests]
    tested = [row for row in found if row.get("p_value") is not None]
    for row, p_value in zip(tested, corrected([row["p_value"] for row in tested]), strict=True):
        row |= {"p_value": p_value, "verdict": "behind" if p_value <= LEVEL else "level"}
    return found


def _row(contest: Contest, setting: Setting, best: Contest | None, targets: Sequence[float]) -> dict[str, Any]:
    fit, name = contest.fit, contest.contender.name
    knob = "none" if fit is None or fit.value is None else f"{contest.contender.knob} {fit.value}"
    row: dict[str, Any] = {
        "name": name, "parameters": fit.parameters if fit else None, "steps": contest.steps or None,
        "knob": knob, "verdict": "not run", "why": contest.why,
    }  # fmt: skip
    if contest.why or contest.outcome is None:
        return row | ({} if contest.why else {"verdict": "running"})
    outcome, finals = contest.outcome, contest.outcome.finals
    row |= {
        "lr": outcome.lr,
        "lr_at_edge": outcome.is_at_edge,
        "rates": {rate_text(lr): score for lr, score in sorted(outcome.rates.items())},
        "stopped_rates": {rate_text(lr): score for lr, score in sorted(outcome.stopped.items())},
    }
    if contest.stopped_at is not None:
        validation = outcome.rates.get(outcome.lr, outcome.stopped.get(outcome.lr))
        return row | {"verdict": "stopped", "stopped_at": contest.stopped_at, "validation": validation}
    scores = _scores(contest, setting)
    row |= {
        "scores": scores,
        "mean": _mean(scores),
        "low": min(scores),
        "high": max(scores),
        "tokens_per_second": _mean([result.tokens_per_second() for result in finals]),
        "peak_gb": max((result.peak_gb() or 0.0 for result in finals), default=None),
        "seconds": _mean([result.seconds() for result in finals]),
        "steps_to_target": _steps_to(finals, targets),
        "forgetting": _mean([result.forgetting() for result in finals]),
        "trials": [str(result.folder) for result in finals],
    }
    return row | _judged(contest, setting, best)


def _judged(contest: Contest, setting: Setting, best: Contest | None) -> dict[str, Any]:
    """Return the p-values of a method against the one with the best mean, not corrected for their number."""
    if contest is best or best is None:
        return {"verdict": "best", "p_value": None, "p_seeds": None, "test": ""}
    seeds = over_seeds(_scores(best, setting), _scores(contest, setting))
    name = setting.score.rpartition("/")[2]  # of several test sets: their split stands before it
    by_rows = _over_rows(_finals(best, setting), _finals(contest, setting), name)
    chosen = by_rows or seeds
    return {
        "verdict": "level",  # until its p-value says otherwise
        "p_value": chosen.p_value,
        "p_seeds": seeds.p_value,
        "test": chosen.name,
    }


Finals = tuple[tuple[Path, float | None], ...]  # folder and test score of each seed's run


def _finals(contest: Contest, setting: Setting) -> Finals:
    assert contest.outcome is not None
    return tuple((result.folder, result.test(setting.score)) for result in contest.outcome.finals)


@cache  # the table is written whenever a method has ended, and runs that have ended do not change
def _over_rows(best: Finals, other: Finals, name: str) -> PairedTest | None:
    """Test two methods over the rows of their runs; None where these have no rows of the score."""
    found = [[row_scores(folder, name, score) for folder, score in finals] for finals in (best, other)]
    first, second = ([one for one in scores if one is not None] for scores in found)
    return over_rows(first, second) if len(first) == len(best) and len(second) == len(other) else None


def _scores(contest: Contest, setting: Setting) -> list[float]:
    """Return the test score of each seed."""
    assert contest.outcome is not None
    found = [result.test(setting.score) for result in contest.outcome.finals]
    return [score for score in found if score is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None where a value is missing."""
    there = [value for value in values if value is not None]
    return mean(there) if there and len(there) == len(values) else None


def _targets(scored: Sequence[Contest]) -> list[float]:
    """Return the validation loss at the end of the first method, by seed: what the others have to reach."""
    ends = [list(result.validations("loss").values()) for result in scored[0].outcome.finals] if scored else []  # type: ignore[union-attr]
    return [losses[-1] for losses in ends] if all(ends) else []


def _steps_to(finals: Sequence[Result], targets: Sequence[float]) -> float | None:
    """Return the mean steps until the validation loss is at most the target, with those that chose the structure.

    None: a seed never gets there.
    """
    return _mean([steps_until(result, target) for result, target in zip(finals, targets, strict=False)])


def steps_until(result: Result, target: float) -> int | None:
    """Return the steps of one run until its validation loss is at most the target, with those of its selection."""
    there = [step for step, loss in result.validations("loss").items() if loss <= target]
    return min(there) + result.selection_steps() if there else None


COLUMNS: Mapping[str, str] = {
    "method": "left", "parameters": "right", "knob": "left", "rate": "right", "score": "right", "p": "right",
    "verdict": "left", "per second": "right", "peak GB": "right", "to target": "right", "forgetting": "right",
}  # fmt: skip


def print_table(content: Mapping[str, Any]) -> None:
    """Print the table of comparison.json, and below it what does not fit into a column."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    better = "higher" if content["higher"] else "lower"
    title = f"{content['recipe']}: test {content['score']} ({better} is better), {content['cost']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name, side in COLUMNS.items():
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in content["methods"]:
        table.add_row(*cells(row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)
    for line in notes(content):
        console.print(line, highlight=False, soft_wrap=True)


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the table as text, in the order of COLUMNS."""
    parameters = "" if row["parameters"] is None else f"{row['parameters']:,}"
    if "mean" not in row:
        rate = rate_text(row["lr"]) if "stopped_at" in row else ""
        verdict = f"stopped at {row['stopped_at']}" if "stopped_at" in row else row["verdict"]
        return [row["name"], parameters, row["knob"] if parameters else "", rate, "", "", verdict, "", "", "", ""]
    score = f"{row['mean']:.4f}"
    if len(row["scores"]) > 1:
        score += f" ({row['low']:.4f} to {row['high']:.4f})"
    return [
        row["name"], parameters, row["knob"], rate_text(row["lr"]) + ("*" if row["lr_at_edge"] else ""), score,
        _probability(row["p_value"]), row["verdict"], _shown(row["tokens_per_second"], ",.0f"),
        _shown(row["peak_gb"], ".2f"), _shown(row["steps_to_target"], ".0f") or "never",
        _shown(row["forgetting"], "+.3f"),
    ]  # fmt: skip


def _probability(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else _shown(value, ".3f")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def notes(content: Mapping[str, Any]) -> list[str]:
    """Return what the table's reader has to know beside it, a line each."""
    methods, lines = content["methods"], []
    ran = [row for row in methods if "mean" in row]
    tests = dict.fromkeys(row["test"] for row in ran if row["test"])
    if tests:
        lines.append(f"p against the best mean, corrected for the number of methods: {'; '.join(tests)}.")
        lines.append(f"level: p > {LEVEL:g}, or not tested.")
    if any(row["lr_at_edge"] for row in ran):
        lines.append("*: the best rate is at the edge of those that were tried; name farther ones by --rates.")
    if ran and not content.get("race"):
        lines.append(f"to target: steps to the validation loss that {ran[0]['name']} ends with.")
    if any(row.get("forgetting") is not None for row in ran):
        lines.append(f"forgetting: rise of the loss on {content['settings']['forgetting']}, nats a token.")
    lines += [f"{row['name']} not run: {row['why']}" for row in methods if row["verdict"] == "not run"]
    lines += race_notes(content)
    return lines


def race_notes(content: Mapping[str, Any]) -> list[str]:
    """Return of a race what stopped the methods that were, and the steps of all; nothing of another comparison."""
    if not content.get("race"):
        return []
    stopped = sorted((row for row in content["methods"] if "stopped_at" in row), key=lambda row: row["stopped_at"])
    lines = [
        f"{row['name']} was stopped at step {row['stopped_at']}: validation {content['choice']} "
        f"{_shown(row['validation'], '.4f') or 'not finite'} at rate {rate_text(row['lr'])}."
        for row in stopped
    ]
    spent = [f"{row['name']} {row['steps_spent']:,}" for row in content["methods"] if row["steps_spent"]]
    if spent:
        lines.append(f"Steps trained, of all rates and seeds and to choose structures: {', '.join(spent)}; ")
        lines[-1] += f"{content['steps_spent']:,} in all."
    return lines
