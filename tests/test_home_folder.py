"""~ means the home folder wherever a path is given: in a recipe, in an override, behind an option's equals sign."""

from pathlib import Path

import pytest

from glora_llm import recipe as recipes
from glora_llm.cli.main import command_parser, parsed
from glora_llm.data.sources import find_path
from glora_llm.models.resolve import look_at_model
from glora_llm.schema import ModelSection


def test_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(recipes.find_recipe("tiny_cpu").read_text(encoding="utf-8"), encoding="utf-8")
    given = ["output.dir=~/run", "adapter.weights=~/start", "training.deepspeed=~/zero.json"]
    recipe = recipes.load("~/mine.yaml", given)
    found = [recipe.output.dir, recipe.adapter.weights, recipe.training.deepspeed]
    assert found == [str(tmp_path / name) for name in ("run", "start", "zero.json")]
    arguments = parsed(command_parser(), ["merge", "~/run", "--out=~/merged"])
    assert (arguments.run, arguments.out) == (tmp_path / "run", tmp_path / "merged")
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    assert find_path("~/rows.jsonl") == tmp_path / "rows.jsonl"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    look_at_model(ModelSection(name_or_path="~"))


def test_a_tilde_inside_a_name_stays() -> None:
    assert recipes.load("tiny_cpu", ["output.dir=./~run"]).output.dir == "./~run"
