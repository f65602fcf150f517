"""A race of methods that are made up: the worse half stops at each rung, and only the winner is tested."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from glora_llm import recipe as recipes
from glora_llm.compare.budget import Fit
from glora_llm.compare.contenders import Contender, contenders
from glora_llm.compare.course import Course, Setting
from glora_llm.compare.outcome import Outcome
from glora_llm.compare.progress import Progress
from glora_llm.compare.race import Race, Racer, planned, require_rungs, rungs
from glora_llm.compare.record import RECIPE, Record
from glora_llm.compare.table import Contest, cells, notes, rows, steps_until
from glora_llm.compare.trial import Result, Trial
from glora_llm.errors import UserError
from tests.compare.test_course import EVERY, STEPS, Loss, MadeUp, bowl


def race(
    out: Path, loss: Loss, rates: Mapping[str, tuple[float, ...]]
) -> tuple[list[Contest], MadeUp, Setting, Record]:
    """Run a race of methods, each of which has rates of its own, by which the made-up loss knows it."""
    out.mkdir(exist_ok=True)
    (out / RECIPE).write_text(recipes.dump(recipes.load("tiny_cpu")))
    (out / "trials").mkdir(exist_ok=True)
    setting, record, pool = Setting(out, "loss", EVERY, (0, 1), None, 100), Record(out, {"budget": "any"}), MadeUp(loss)
    contests = [Contest(Contender(name), Fit(1, 100), STEPS, given) for name, given in rates.items()]
    racers = []
    for contest in contests:
        adapter = {"method": contest.contender.method}
        make = partial(Trial, contest.contender.name, steps=STEPS, adapter=adapter, root=out / "trials")
        course = Course(setting, lambda lr, seed, make=make: make(lr=lr, seed=seed), record, pool, Progress(100, 2))  # type: ignore[misc]
        racers.append(Racer.of(contest, course))
    Race(setting, racers, STEPS, lambda: None).run()
    return contests, pool, setting, record


FIVE: dict[str, tuple[float, ...]] = {
    "lora": (1e-3,), "dora": (2e-3,), "rslora": (3e-3,), "ia3": (5e-3,), "oft": (1e-2,),
}  # fmt: skip


def test_the_worse_half_stops_and_the_winner_is_tested(tmp_path: Path) -> None:
    contests, pool, setting, _ = race(tmp_path, bowl(2e-3), FIVE)
    assert {one.contender.name: one.stopped_at for one in contests} == {
        "lora": 4, "dora": None, "rslora": 6, "ia3": 2, "oft": 2,
    }  # fmt: skip
    expected = {(lr, 0, 2, False) for (lr,) in FIVE.values()} | {(lr, 0, 4, False) for lr in (1e-3, 2e-3, 3e-3)}
    expected |= {(2e-3, 0, 6, False), (3e-3, 0, 6, False)} | {(2e-3, seed, STEPS, True) for seed in (0, 1)}
    assert set(pool.launched) == expected and len(pool.launched) == len(expected)
    table = rows(contests, setting)
    assert [row["verdict"] for row in table] == ["stopped", "best", "stopped", "stopped", "stopped"]
    assert table[0]["validation"] == pytest.approx(math.log(2) + 1 / 4) and "mean" not in table[0]
    assert len(table[1]["scores"]) == 2 and table[1]["stopped_rates"] == {}
    again, pool, *_ = race(tmp_path, bowl(2e-3), FIVE)
    assert pool.launched == [] and [one.stopped_at for one in again] == [one.stopped_at for one in contests]


def test_a_method_is_as_good_as_its_best_rate_so_far(tmp_path: Path) -> None:
    rates = {"lora": (1e-3, 2e-3, 4e-3, 8e-3), "dora": (1.5e-3, 3e-3, 6e-3, 1.2e-2)}
    contests, pool, *_ = race(tmp_path, bowl(1.4e-3), rates)
    assert (contests[0].stopped_at, contests[1].stopped_at) == (6, None)
    ends = {(1.5e-3, 0, STEPS, False), (3e-3, 0, STEPS, False)}
    assert {one for one in pool.launched if one[2] == STEPS} == ends | {(1.5e-3, seed, STEPS, True) for seed in (0, 1)}
    outcome = contests[1].outcome
    assert outcome is not None and outcome.lr == 1.5e-3 and set(outcome.stopped) == {6e-3, 1.2e-2}


def test_one_that_diverges_is_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    def loss(lr: float, seed: int, step: int) -> float:
        return math.nan if lr > 4e-3 else bowl(2e-3)(lr, seed, step)

    contests, *_ = race(tmp_path, loss, FIVE)
    assert [one.why for one in contests[3:]] == [
        f"it diverged at every rate that was tried: {rate}" for rate in ("5e-3", "1e-2")
    ]
    assert {one.contender.name for one in contests if one.stopped_at} == {"lora", "rslora"}
    assert contests[1].outcome is not None and len(contests[1].outcome.finals) == 2


def test_the_table_says_who_was_stopped_when_and_what_all_of_it_took(tmp_path: Path) -> None:
    contests, _, setting, record = race(tmp_path, bowl(2e-3), FIVE)
    spent = dict.fromkeys(FIVE, 0)
    for trial in record.trials.values():
        spent[trial["method"]] += trial["trained"]
    assert spent == {"lora": 4, "dora": 24, "rslora": 6, "ia3": 2, "oft": 2}
    table = [row | {"steps_spent": spent[row["name"]]} for row in rows(contests, setting)]
    content = {"race": True, "choice": "loss", "steps_spent": 38, "methods": table, "settings": {"forgetting": None}}
    assert cells(table[2])[6] == "stopped at 6" and cells(table[2])[3] == "3e-3"
    said = "\n".join(notes(content))
    assert "oft was stopped at step 2: validation loss 2.1094 at rate 1e-2." in said
    assert "lora 4, dora 24, rslora 6, ia3 2, oft 2; 38 in all." in said


def test_rates_that_were_stopped_did_not_diverge() -> None:
    found = Outcome(stopped={1e-3: 0.5, 2e-3: None})
    assert found.diverged() == "it diverged at every rate that went on: 2e-3; stopped before: 1e-3"


def test_steps_until_a_loss_are_those_of_the_selection_too(tmp_path: Path) -> None:
    (tmp_path / "structure").mkdir()
    (tmp_path / "structure" / "choice.json").write_text('{"samples": 17}')
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipes.load("tiny_cpu", ["training.global_batch=8"])))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "validation/loss": 0.9}\n{"step": 4, "validation/loss": 0.5}\n'
    )
    result = Result.of(tmp_path)
    assert [steps_until(result, target) for target in (0.9, 0.6, 0.4)] == [2 + 3, 4 + 3, None]


def test_rungs() -> None:
    assert rungs(2, 75, 12) == [36] and rungs(8, 75, 12) == [12, 24, 36] and rungs(1, 75, 12) == []
    assert rungs(5, 24, 8) == [8, 16], "two get to the end"
    assert rungs(3, 24, 24) == []
    assert planned([1, 1, 1, 1, 1], STEPS, EVERY, 2) == 5 * 2 + 3 * 2 + 2 * 2 + 6 + STEPS
    require_rungs(5, 24, 8)
    with pytest.raises(UserError, match=r"evaluation\.every=24 has none before step 24"):
        require_rungs(3, 24, 24)


def test_targets_are_part_of_a_contender() -> None:
    one, other, third = contenders("lora@q_proj+v_proj,glora:uniform@down_proj,dora@all-linear")
    base = recipes.load("tiny_cpu").adapter
    assert one.settings(base, 2)["targets"] == ["q_proj", "v_proj"] and one.knob == "rank" and one.method == "lora"
    found = other.settings(base, 1000)
    assert (found["targets"], found["predictor"], found["budget"]) == (["down_proj"], "uniform", 1000)
    assert third.settings(base, 2)["targets"] == "all-linear"
    with pytest.raises(UserError, match=r"names lora@v\+q twice, as lora@q\+v too"):
        contenders("lora@q+v,lora@v+q")
