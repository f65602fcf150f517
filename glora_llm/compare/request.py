"""The request for a comparison (methods, budget or time, rates, seeds), checked without slow imports."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glora_llm import recipe as recipes
from glora_llm.compare.contenders import Contender, contenders
from glora_llm.compare.record import read
from glora_llm.errors import Problems, UserError, number_above_zero
from glora_llm.plan.early import check_early
from glora_llm.plan.elsewhere import SHIPPED
from glora_llm.schema import Recipe
from glora_llm.schema.benchmarks import benchmark_of
from glora_llm.schema.scores import score_of
from glora_llm.search.limits import amount

MOST_SEEDS = 1000
LARGEST_RATE = 1000.0
AUTO: Literal["auto"] = "auto"  # each method at what `training.lr: auto` is for it


@dataclass(frozen=True)
class Request:
    """The options of `glora-llm compare`.

    Args:
        name: of the recipe, as the user gave it.
        recipe: with the user's overrides.
        contenders: the methods.
        budget: trained parameters; None: equal time.
        nearest: a method that misses the budget by more than a quarter takes part at its nearest.
        seconds: of training; None: equal parameters.
        seeds: how many.
        rates: that are tried; auto: that of `training.lr: auto`; None: those of each method.
        full_rates: that are tried instead for methods that train whole weights; None: those of each method.
        score: that decides.
        forgetting: source of the other text; None: none.
        out: folder of the comparison.
        jobs: trials at once; None: one a GPU, or one a core.
        race: the worse half of the methods stops at some validations, and one is tested.
    """

    name: str
    recipe: Recipe
    contenders: list[Contender]
    budget: int | None
    nearest: bool
    seconds: float | None
    seeds: int
    rates: tuple[float, ...] | Literal["auto"] | None
    full_rates: tuple[float, ...] | None
    score: str
    forgetting: str | None
    out: Path
    jobs: int | None
    race: bool = False

    @property
    def cost(self) -> str:
        """The cost that is equal for all methods, in words."""
        if self.budget is not None:
            return f"{self.budget:,} trained parameters"
        return f"{self.seconds:g} s of training"


def read_rates(text: str | None, option: str = "--rates") -> tuple[float, ...] | None:
    """Return the learning rates of an option, from the lowest.

    Raises:
        UserError: for something that is no rate, and a rate that stands there twice.
    """
    if text is None:
        return None
    rates, more = [], ", or auto" if option == "--rates" else ""
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not 0 < rate <= LARGEST_RATE:
            raise UserError(f"{option}: '{part.strip()}' is no learning rate; expected some as 5e-4,1e-3,2e-3{more}.")
        if rate in rates:
            raise UserError(f"{option} names {part.strip()} twice.")
        rates.append(rate)
    return tuple(sorted(rates))


def read_count(text: str | None, option: str, most: int) -> int | None:
    """Return a number from 1 on.

    Raises:
        UserError: for something else.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:9]) <= most):
        raise UserError(f"{option} is '{text}'; expected a number from 1 to {most}.")
    return int(text)


def read_budget(text: str | None) -> int | None:
    """Return the trained parameters that `--budget` asks for: `0.3M` is 300,000.

    Raises:
        UserError: for something that is no number above 0.
    """
    if text is None:
        return None
    number = round(amount(text, "--budget"))
    if number < 1:
        raise UserError(f"--budget is '{text}'; expected a number of parameters above 0, such as 0.3M.")
    return number


def read_request(  # noqa: PLR0913 - an option each
    *, name: str, overrides: Sequence[str], methods: str, budget: str | None, nearest: bool, seconds: str | None,
    seeds: str, rates: str | None, full_rates: str | None, score: str | None, forgetting: str | None,
    out: Path | None, jobs: str | None, race: bool = False,
) -> Request:  # fmt: skip
    """Return the options of a command line.

    Raises:
        UserError: with everything that is wrong.
    """
    recipe = recipes.load(name, overrides)
    if nearest and budget is None:
        raise UserError("--nearest is about --budget, and there is --time, of which every method gets the same.")
    if race and budget is None:
        raise UserError("--race is about --budget: with --time each method would stop at other steps.")
    chosen, main = contenders(methods), _main_score(recipe, score)
    if race and len(chosen) < 2:
        raise UserError(f"--race is between two methods or more, and --methods names {chosen[0].name} alone.")
    text = SHIPPED if forgetting is None and recipe.data.format != "images" and not recipe.head else forgetting
    request = Request(
        name=Path(name).stem, recipe=recipe, contenders=chosen, budget=read_budget(budget),
        nearest=nearest,
        seconds=number_above_zero(seconds, "--time", "seconds of training above 0, such as 600"),
        seeds=read_count(seeds, "--seeds", MOST_SEEDS) or 1, rates=AUTO if rates == AUTO else read_rates(rates),
        full_rates=read_rates(full_rates, "--full-rates"),
        score=main, forgetting=None if text == "none" else text, out=out or Path("runs") / f"compare-{Path(name).stem}",
        jobs=read_count(jobs, "--jobs", 10_000),
        race=race,
    )  # fmt: skip
    require_held_out(recipe)
    return request


def _main_score(recipe: Recipe, score: str | None) -> str:
    """Return the score that decides: the user's, the first one of the benchmark, or else the loss."""
    if score is not None:
        score_of(score)
        return score
    benchmark = recipe.data.benchmark
    return benchmark_of(benchmark).metrics[0] if benchmark is not None else "loss"


def require_held_out(recipe: Recipe) -> None:
    """Check that a recipe has validation rows to choose by, and test rows to judge by.

    Raises:
        UserError: when it lacks either.
    """
    found = Problems()
    for split, use in (("validation", "chooses learning rates"), ("test", "judges")):
        with found.collected():
            if getattr(recipe.data, split) is None:
                raise UserError(f"compare {use} by {split} rows, and the recipe has none: set data.{split}.")
    found.raise_all()


def check_request(request: Request) -> None:
    """Check names and paths of the recipe, and the folder of the comparison.

    Raises:
        UserError: with everything that is wrong.
    """
    recipe, place = request.recipe, str(request.out / "trials" / "new")
    update: dict[str, object] = {"output": recipe.output.model_copy(update={"dir": place})}
    if request.forgetting is not None:
        update["evaluation"] = recipe.evaluation.model_copy(update={"forgetting": request.forgetting})
    found = Problems()
    with found.collected():
        read(request.out)
    with found.collected():
        check_early(recipe.model_copy(update=update), 1)
    found.raise_all()
