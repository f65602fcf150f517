"""The table of best rates: read from run folders as runs leave them, with what their lines come to."""

import json
import math
from pathlib import Path

import pytest

from glora_llm import recipe
from scripts import bench_scales
from scripts.scales.best_rates import best_rate, finer


def run(out: Path, form: str, rate: str, loss: float | None, seed: int = 0) -> None:
    folder = bench_scales.folder(out, form, rate, seed)
    folder.mkdir(parents=True)
    log = f"{bench_scales.DIVERGED}\n" if loss is None else ""
    (out / f"{folder.name}.log").write_text(log)
    if loss is not None:
        (folder / "summary.json").write_text(json.dumps({"validation": {"validation/loss": loss}}))


def test_losses_are_those_of_the_runs(tmp_path: Path) -> None:
    for rate, loss in (("1e-3", 1.5), ("2e-3", 1.0), ("5e-3", None)):
        run(tmp_path, "B lora", rate, loss)
    run(tmp_path, "B lora", "auto", 0.9)
    run(tmp_path, "B vector", "1e-3", 7.0)
    found = bench_scales.losses(tmp_path, "B lora", [0])
    assert found == {0.001: 1.5, 0.002: 1.0, 0.005: math.inf}
    assert "diverged" in bench_scales.table({"B lora": found})
    bench_scales.folder(tmp_path, "B lora", "1e-2", 0).mkdir()
    assert bench_scales.losses(tmp_path, "B lora", [0]) == found, "a run that has not ended has no loss"


def test_the_best_rate_is_the_middle_of_those_as_good_as_the_best() -> None:
    losses = {rate: math.log(rate / 3e-3) ** 2 for rate in (1e-4, 1e-3, 3e-3, 9e-3, 9e-2)}
    rate, is_open = best_rate(losses)
    assert rate == pytest.approx(3e-3, rel=1e-6) and not is_open
    noisy = {1e-3: 1.0, 2e-3: 0.21, 4e-3: 0.25, 8e-3: 0.2, 1.6e-2: 1.0}  # the bar is 0.27
    assert best_rate(noisy)[0] == pytest.approx(4e-3, rel=0.02), "chance does not move the middle"
    rate, is_open = best_rate({1e-3: 1.02, 2e-3: 1.0})
    assert rate == pytest.approx(math.sqrt(2) * 1e-3) and is_open
    assert not best_rate({1e-4: 2.0, 1e-3: 1.0, 2e-3: math.inf})[1], "divergence ends the range"
    assert math.isnan(best_rate({1e-3: math.inf})[0])


def test_rates_are_added_beyond_those_that_are_as_good_as_the_best() -> None:
    assert finer({5e-4: 2.0, 2e-3: 1.0, 8e-3: math.inf}) == []
    assert finer({5e-4: 1.0, 2e-3: 1.05}) == ["0.000125", "0.008"]
    assert finer({5e-4: 2.0, 2e-3: 1.0}) == ["0.008"]
    assert finer({5e-4: math.inf}) == []


@pytest.mark.parametrize("task", bench_scales.TASKS)
def test_every_run_is_a_command(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLORA_DATA", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["bench_scales.py", "slots", "--task", task])
    arguments = bench_scales.parse()
    words = bench_scales.command(arguments, bench_scales.SLOTS["A block"], "1e-3", 0)
    checked = recipe.load(words[2], words[3:])
    assert checked.training.steps == bench_scales.TASKS[task][0] and not checked.evaluation.test
    assert checked.adapter.scaling == "even" and checked.data.validation == 200


def test_an_exponent_is_the_slope_over_ranks() -> None:
    found = {}
    for rank in (1, 4, 16):
        best = 1e-2 * rank**-0.5
        found[f"LoRA {rank}"] = {
            rate: (math.log(rate) - math.log(best)) ** 2
            for rate in (best / 8, best / 4, best / 2, best, best * 2, best * 4)
        }
    assert "LoRA: best rate as rank ^ -0.50 at alpha / rank, so RANK_EXPONENT 1.50" in bench_scales.exponents(found)


@pytest.mark.parametrize("section", bench_scales.TABLES["auto"].values(), ids=bench_scales.TABLES["auto"])
def test_every_form_is_a_recipe_with_an_automatic_rate(section: str) -> None:
    checked = recipe.load("smollm2_glora", [f"adapter={section}", "training.lr=auto"])
    assert checked.adapter.alpha == 16 and checked.training.lr == "auto"
