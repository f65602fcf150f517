"""The supernet's benchmark: every trial is a recipe of equal steps, and the table is what run folders say."""

import json
from pathlib import Path
from typing import Any

import pytest

from glora_llm import recipe
from scripts import bench_supernet
from scripts.bench_scales import DIVERGED


def planned(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> tuple[list[bench_supernet.Run], Any]:
    monkeypatch.setenv("GLORA_DATA", str(out))
    monkeypatch.setattr("sys.argv", ["bench_supernet.py", "--out", str(out), *words])
    arguments = bench_supernet.parse()
    return bench_supernet.planned(arguments), arguments


def test_every_variant_is_a_recipe_and_has_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, _ = planned(monkeypatch, tmp_path, "--steps", "30", "--further", "10", "--start", "8")
    checked: dict[Path | None, Any] = {
        run.folder: recipe.load(run.words[2], [*run.words[3:], f"output.dir={run.folder}"]) for run in runs
    }
    assert len(checked) == len(bench_supernet.VARIANTS) + 1, "both supernets from B have the same start"
    for run in runs:
        one = checked[run.folder]
        steps = one.training.steps + (one.search.finetune_steps if one.search else 0)
        steps += checked[run.needs].training.steps if run.needs else 0
        assert steps == (8 if run.variant == bench_supernet.START else 40)
        assert one.training.lr == 2.5e-3 and one.adapter.alpha == 16 and one.training.global_batch == 8
        assert one.adapter.is_supernet == (run.variant not in (bench_supernet.LORA, bench_supernet.START))
        assert one.search is None or str(one.search.budget) == "610560"
    options = {run.variant: checked[run.folder].adapter.supernet for run in runs}
    assert options["even+distill"].sandwich == 4 and options["even+distill"].distill == 0.5
    assert options["even+weighted"].odds["B"] == {"lora": 4.0}


def test_the_table_is_what_the_runs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, arguments = planned(monkeypatch, tmp_path, "--variants", "LoRA", "even", "even+from B", "plain")
    by_variant = {run.variant: run for run in runs}

    def write(variant: str, further: float, **more: object) -> None:
        folder = by_variant[variant].folder
        (folder / "finetuned").mkdir(parents=True)
        one = {"test": {"test/loss": further, "test/exact_match": 0.75}, "trained_parameters": 500_000, "steps": 24,
               "seconds": 10.0}  # fmt: skip
        (folder / "finetuned" / "summary.json").write_text(json.dumps(one))
        whole = one | {"steps": 48, "test_finetuned": one["test"], "test_genome": {"test/loss": 0.4}, **more}
        (folder / "summary.json").write_text(json.dumps(whole | {"search": {"610560": {"seconds": 5.0}}}))

    write("LoRA", 0.2, steps=72)
    write("even", 0.3, test={"test/loss": 2.0})
    write("even+from B", 0.25, steps=32, test={"test/loss": 1.0})
    start = by_variant[bench_supernet.START].folder
    start.mkdir()
    (start / "summary.json").write_text(json.dumps({"test": {}, "steps": 16, "seconds": 4.0}))
    bench_supernet.log_of(by_variant["plain"]).write_text(f"{DIVERGED}\n")
    lines = bench_supernet.table(runs, arguments).splitlines()
    assert lines[2:] == [
        "| LoRA | 0.0025 | 1 | 500,000 | - | - | 0.200 | 0.750 | 72 | 10 (0) |",
        "| even | 0.0025 | 1 | 500,000 | 2.000 | 0.400 | 0.300 | 0.750 | 72 | 25 (5) |",
        "| even+from B | 0.0025 | 1 | 500,000 | 1.000 | 0.400 | 0.250 | 0.750 | 72 | 29 (5) |",
        "| plain | 0.0025 | 0, 1 diverged | - | - | - | - | - | - | - |",
    ]
