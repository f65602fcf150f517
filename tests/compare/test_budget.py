"""The budget: counts are those of really built models, and the nearest value of the knob is found with few of them."""

from collections.abc import Callable

import pytest
import torch

from glora_llm import recipe as recipes
from glora_llm.adapters.inject import inject
from glora_llm.compare.budget import Fit, nearest_value, parameters_of, require_near, solve
from glora_llm.compare.command import _recipe_of
from glora_llm.compare.contenders import Contender, contenders
from glora_llm.errors import UserError
from glora_llm.models.load import load_base
from glora_llm.plan.plan import Plan, make_plan
from glora_llm.schema import AdapterSection

BUDGET = 30_000
METHODS = ["lora", "rslora", "dora", "loha", "lokr", "hra", "oft", "vera", "miss", "fourierft", "c3a", "ia3", "ssf"]
METHODS += [
    "repadapter",
    "glora",
    "glora:even",
    "glora:agreement",
    "glora:lora",
    "glora:hira",
    "glora:repadapter",
    "glora:ssf",
]
METHODS += ["p_tuning", "p_tuning_v2", "houlsby", "compacter", "glora:short_run", "lora@q_proj+v_proj"]


@pytest.fixture(scope="module")
def plan(cache: object) -> Plan:
    return make_plan(recipes.load("tiny_cpu"), world_size=1)


def section(plan: Plan, contender: Contender) -> Callable[[int | None], AdapterSection]:
    return lambda value: _recipe_of(plan.recipe, contender, value).adapter


@pytest.mark.parametrize("name", METHODS)
def test_the_nearest_is_counted_as_a_built_model_counts(name: str, plan: Plan) -> None:
    contender = Contender(name)
    make = section(plan, contender)
    fit = solve(plan, contender, make, BUDGET)
    adapter = make(fit.value)
    base = load_base(plan.recipe.model, plan.base.folder, torch.device("cpu"))
    built = inject(base, adapter, 0, plan.steps)
    assert sum(p.numel() for p in built.parameters() if p.requires_grad) == fit.parameters
    assert (fit.value is None) == (contender.knob is None)
    for other in () if fit.value is None else {max(1, fit.value - 1), fit.value + 1} - {fit.value}:
        try:
            count = parameters_of(plan, make(other))
        except UserError:  # a value that the method rejects
            continue
        assert abs(count - BUDGET) >= abs(fit.parameters - BUDGET), f"{other} is nearer"


def test_a_rank_keeps_the_scale_and_the_recipe_its_targets() -> None:
    base = recipes.load("tiny_cpu", ["adapter.targets=[q_proj]", "adapter.dropout=0.1"]).adapter
    found = Contender("dora").settings(base, 3)
    assert found == {"method": "dora", "targets": ["q_proj"], "rank": 3, "alpha": 6.0, "dropout": 0.1}
    found = Contender("glora:hira").settings(base, 5)
    assert found["preset"] == "hira" and "slots" not in found and found["alpha"] == 10.0
    assert Contender("glora").settings(base, 5)["slots"] == base.model_dump(mode="json")["slots"]
    assert Contender("fourierft").settings(base, 50)["peft"] == {"n_frequency": 50}


def counted(count: Callable[[int], int], budget: int) -> tuple[Fit, int]:
    calls: list[int] = []

    def one(value: int) -> int:
        calls.append(value)
        return count(value)

    return nearest_value(one, budget), len(calls)


def only_divisors(value: int) -> int:
    if 576 % value:
        raise UserError(f"{value} divides nothing")
    return 576 * 576 // value


def blocks(value: int) -> int:
    if value < 4 or 192 % value:
        raise UserError(f"{value} is no block of these layers")
    return 106_168_320 // value


def up_to_64(value: int) -> int:
    if value > 64:
        raise UserError("too large")
    return 100 * value


@pytest.mark.parametrize(
    ("count", "budget", "value", "most_calls"),
    [
        (lambda value: 1000 * value, 10_400, 10, 6),
        (lambda value: 1000 * value + 333, 10_400, 10, 6),
        (lambda value: 1000 * value, 300, 1, 2),
        (lambda value: value * value, 5000, 71, 20),
        (only_divisors, 50_000, 6, 12),
        (blocks, 600_000, 192, 25),
        (lambda value: 100 * (value // 3), 1000, 31, 20),
        (up_to_64, 6350, 63, 8),
        (up_to_64, 100_000, 64, 20),
        (lambda value: 5, 100, 1, 3),
    ],
    ids=[
        "line",
        "line with a start",
        "below all",
        "square",
        "falling",
        "blocks",
        "steps",
        "with an end",
        "above all",
        "flat",
    ],
)
def test_the_nearest_value_is_found_with_few_counts(
    count: Callable[[int], int], budget: int, value: int, most_calls: int
) -> None:
    fit, calls = counted(count, budget)
    assert fit == Fit(value, count(value)) and calls <= most_calls


def test_a_budget_that_no_rank_meets_names_the_nearest_of_each() -> None:
    fits = {Contender("lora"): Fit(1, 1000), Contender("glora"): Fit(1, 3000), Contender("ia3"): Fit(None, 17)}
    require_near({one: fit for one, fit in fits.items() if one.name != "glora"}, 900)
    with pytest.raises(UserError) as error:
        require_near(fits, 900)
    for part in (
        "--budget 900 is met within 25% by no value of glora.",
        "Nearest: lora 1,000 (rank 1); glora 3,000 (rank 1). Give --budget 3000, fewer modules",
    ):
        assert part in str(error.value)
    assert "ia3" not in str(error.value), "it has no knob, and is taken as it is"


def test_methods_are_read_in_their_order() -> None:
    names = ["lora", "glora:hira", "adaption_prompt"]  # the last one does not train, and is listed with the reason
    assert [one.name for one in contenders(" lora, glora:hira,adaption_prompt")] == names
