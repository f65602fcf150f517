"""The comparison of VLoRA's forms: every command is a whole recipe, what is finished stays, tables, the figure."""

import json
import sys
from pathlib import Path

import pytest

from glora_llm import recipe as recipes
from glora_llm.cli.main import command_parser, parsed
from glora_llm.cli.vlora_from_dense import smaller_recipe
from glora_llm.models.load import meta_model
from glora_llm.plan.subjects import subject_here
from glora_llm.schema import Recipe
from scripts.vlora_forms.forms import TABLES, TWINS
from scripts.vlora_forms.results import bytes_figure, dense_table, first_below, read_forms, training_table
from scripts.vlora_forms.runs import command, finished, run_all, solve_twins

SIZES = {"dense-narrow": ["model.config.hidden_size=128"]}
WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1][11:]).mkdir(parents=True); "


def recipe_of(words: list[str]) -> Recipe:
    if "from-dense" in words:
        return smaller_recipe(parsed(command_parser(), [*words[3:5], "--out", "x", *words[5:]]))
    name = words.index("--recipe") + 1
    return recipes.load(words[name], words[name + 1 :])


@pytest.mark.parametrize("name", TABLES)
def test_every_form_is_a_recipe_of_its_own(name: str) -> None:
    table = TABLES[name]
    found = {
        form: recipes.dump(recipe_of(command(table, form, 3, ["training.steps=7", "model.dtype=bfloat16"], SIZES)))
        for form in table.forms
        if form not in TWINS or form in SIZES
    }
    assert len(found) > 4 and len(set(found.values())) == len(found)
    for text in found.values():
        assert "seed: 3" in text and "steps: 7" in text and "dtype: bfloat16" in text


def test_the_dense_twins_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GLORA_DATA", str(tmp_path / "absent"))
    table = TABLES["text"]
    small = (
        "{model_type: llama, hidden_size: 64, intermediate_size: 160, num_hidden_layers: 12, num_attention_heads: 4}"
    )
    changes = [f"model.config={small}", "model.tokenizer=train:300"]
    twins = solve_twins(table, changes, tmp_path / "twins.json")
    assert list(twins) == list(TWINS) and solve_twins(table, changes, tmp_path / "twins.json") == twins
    counts = {}
    for form in ("paper", "dense", *TWINS):
        recipe = recipe_of(command(table, form, 0, changes, twins))
        folder, _ = subject_here(recipe, 1, "the text is not here")
        counts[form] = sum(parameter.numel() for parameter in meta_model(recipe.model, folder).parameters())
    for form in ("dense-narrow", "dense-shallow"):
        assert counts[form] == pytest.approx(counts["paper"], rel=0.02)
    assert counts["dense-middle"] == pytest.approx((counts["paper"] * counts["dense"]) ** 0.5, rel=0.02)


def test_a_finished_run_is_not_repeated_and_a_failed_one_is_named(tmp_path: Path) -> None:
    done = tmp_path / "done"
    done.mkdir()
    (done / "summary.json").write_text('{"test": {"test/loss": 1.0}}')
    writes = WRITES + """pathlib.Path(sys.argv[1][11:], "summary.json").write_text('{"validation": {"x": 1}}')"""
    runs = [
        (done, [sys.executable, "-c", "raise SystemExit(9)"]),
        (tmp_path / "fails", [sys.executable, "-c", "print('a reason'); raise SystemExit(1)"]),
        (tmp_path / "new", [sys.executable, "-c", writes]),
    ]
    assert run_all(runs, jobs=2) == [tmp_path / "fails"]
    assert "a reason" in (tmp_path / "fails.log").read_text()
    assert finished(tmp_path / "new") and not (tmp_path / "done.log").exists()
    with pytest.raises(KeyboardInterrupt):  # told to stop
        run_all([(tmp_path / "stops", [sys.executable, "-c", "raise SystemExit(75)"])], jobs=1)


def write_run(folder: Path, recipe: Recipe, losses: list[float], **summary: object) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipes.dump(recipe))
    lines = [{"step": n, "train/loss": loss, "train/seconds_per_step": 2.0} for n, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"seconds": 9.0, "peak_memory_gb": 1.0, **summary}))


def test_the_table_and_the_figure_are_of_what_the_runs_wrote(tmp_path: Path) -> None:
    table, rows = TABLES["text"], {"dense": (8000, 1.0), "dense-narrow": (3000, 1.5), "paper": (3000, 1.25)}
    for form, (parameters, score) in rows.items():
        for seed in (0, 1):
            recipe = recipe_of(command(table, form, seed, [], SIZES))
            losses = [7.0] * 30 + [6.0] * 70 if form == "paper" else [7.0] * 60 + [6.0] * 40
            scores = {"test/bits_per_byte": score + 0.25 * seed, "test/loss": 9.0}
            write_run(tmp_path / f"{form}-{seed}", recipe, losses, test=scores, trained_parameters=parameters)
    write_run(
        tmp_path / "star-0", recipe_of(command(table, "star", 0, [], {})), [7.0], trained_parameters=1
    )  # going on
    name, forms = read_forms(tmp_path, table, list(table.forms), [0, 1])
    assert name == "test/bits_per_byte" and [form.name for form in forms] == ["dense", "paper", "dense-narrow"]
    run = forms[1].runs[0]
    assert first_below(run, 6.51, 10) == 34 and first_below(run, 5.0, 10) is None  # five of ten at 6, from step 35
    lines = training_table(table, name, forms).splitlines()
    assert lines[3].startswith("| paper | 3,000 | 0.0 | 1.3750 (1.2500 to 1.5000, 2) | 1.222 | 35, 35 | 200 |")
    # the rival's last 50 steps are 10 at 7 and 40 at 6; the first 50 with more at 6 end with step 71, of 2 s each
    assert lines[3].endswith("| 142, 142 |")
    bytes_figure(name, forms).savefig(tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert drawn.startswith("<?xml") and "dense-narrow" in drawn


def test_what_was_lost_of_a_dense_model(tmp_path: Path) -> None:
    table = TABLES["from-dense"]
    recipe = recipe_of(command(table, "distilled", 0, [], {}))
    key = "validation/loss"
    losses = {"teacher": {key: 2.0}, "at_start": {key: 8.0}, "validation": {key: 3.0}}
    write_run(tmp_path / "distilled-0", recipe, [3.0], trained_parameters=5, **losses)
    name, forms = read_forms(tmp_path, table, list(table.forms), [0])
    last = dense_table(name, forms).splitlines()[-1]
    assert last == "| distilled | 5 | 2.0000 | 8.0000 | 3.0000 | 1.500 (1.500 to 1.500, 1) | 2 |"
