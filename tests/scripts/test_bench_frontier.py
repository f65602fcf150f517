"""The frontier: its comparisons are requests that `compare` takes, and its table reads what they leave."""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from glora_llm import recipe as recipes
from glora_llm.compare.command import _recipe_of
from glora_llm.compare.request import read_request
from scripts import bench_frontier


def options(out: Path, **more: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "out": out, "tasks": ["banking77", "rte"], "budgets": ["0.305M", "0.05M"], "methods": bench_frontier.METHODS,
        "rates": ["1e-3", "4e-3"], "seeds": 1, "steps": 5, "dtype": "bfloat16", "jobs": 1, "forgetting": None,
        "slots": "null",
    }  # fmt: skip
    return argparse.Namespace(**(values | more))


def test_every_comparison_is_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLORA_DATA", str(tmp_path))
    arguments = options(tmp_path)
    comparisons = bench_frontier.planned(arguments)
    assert [len(one.methods) for one in comparisons] == [5, 6, 5, 6], "LoRA on two choices of targets"
    for one in comparisons:
        words = bench_frontier.command(one, arguments)[4:]
        named = {name.removeprefix("--"): value for name, value in itertools.pairwise(words) if name[:2] == "--"}
        last = max(place for place, word in enumerate(words) if word.startswith("--")) + 2
        request = read_request(
            name=named["recipe"], overrides=words[last:], methods=named["methods"], budget=named["budget"],
            nearest=False, seconds=None, seeds=named["seeds"], rates=named["rates"], full_rates=None,
            score=named["score"], forgetting="none", out=Path(named["out"]), jobs=named["jobs"],
        )  # fmt: skip
        for contender in request.contenders:
            assert _recipe_of(request.recipe, contender, None).adapter.method == contender.method
            assert (contender.targets is None) == ("@" not in contender.name)
            section = contender.settings(request.recipe.adapter, request.budget if contender.knob == "budget" else 2)
            assert section["method"] in ("lora", "glora")
            assert ("budget" in section) == (contender.knob == "budget")


def row(name: str, parameters: int, mean: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "parameters": parameters, "mean": mean, "low": mean, "high": mean, "scores": [mean], "lr": 1e-3,
        "lr_at_edge": False, "rates": {"1e-3": mean}, "steps": 5, "forgetting": 0.1, "verdict": "level", "trials": [],
        **more,
    }  # fmt: skip


def test_the_best_targets_are_chosen_by_validation_rows(tmp_path: Path) -> None:
    arguments = options(tmp_path, tasks=["banking77"], budgets=["0.05M"])
    comparisons = bench_frontier.planned(arguments)
    (one,) = comparisons
    one.folder.mkdir(parents=True)
    rows = []
    for name, validation, test, losses in (
        ("glora:agreement", 0.2, 0.25, {2: 0.9, 4: 0.7, 5: 0.5}),
        ("lora@k_proj+v_proj", 0.9, 0.1, {2: 0.95, 5: 0.7}),
        ("lora@o_proj", 0.2, 0.3, {2: 0.95, 5: 0.7}),
    ):
        trial = tmp_path / name
        trial.mkdir()
        lines = [json.dumps({"step": step, "validation/loss": loss}) for step, loss in losses.items()]
        (trial / "metrics.jsonl").write_text("\n".join(lines))
        if name == "glora:agreement":
            (trial / "structure").mkdir()
            (trial / "structure" / "choice.json").write_text('{"samples": 20}')
            (trial / "recipe.yaml").write_text(recipes.dump(recipes.load("tiny_cpu", ["training.global_batch=8"])))
        rates = {"1e-3": validation, "4e-3": 0.0}
        rows.append(row(name, 49_000, test, rates=rates, trials=[str(trial)]))
    (one.folder / "comparison.json").write_text(json.dumps({"methods": rows, "higher": True}))
    found = bench_frontier.points(comparisons, "banking77")
    assert {one["name"] for one in found} == {"glora:agreement", "lora on k_proj, v_proj"}
    text = bench_frontier.table("banking77", found)
    expected = (
        "| 0.05M | glora:agreement | 49,000 | 0.001 | 0.250 (0.250 to 0.250, 1) | +0.150 (not tested) | 7 | +0.100 |"
    )
    assert expected in text
    bench_frontier.draw({"banking77": found}).savefig(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_a_method_that_did_not_run_says_why() -> None:
    text = bench_frontier.table(
        "rte", [{"name": "lora", "parameters": None, "budget": "1M", "verdict": "not run", "why": "x"}]
    )
    assert "| 1M | lora | - | - | x | - | - | - |" in text
