"""The catalogue of benchmarks: every entry is complete, and fills a recipe."""

from pathlib import Path

import pytest

from glora_llm import recipe as recipes
from glora_llm.data.formats import FORMATS, check_settings
from glora_llm.errors import UserError
from glora_llm.schema.benchmarks import BENCHMARKS, benchmark_of
from glora_llm.schema.scores import SCORES

BARE = """\
model: {name_or_path: embedded:tiny-llama}
data: {benchmark: NAME, max_tokens: 64}
training: {global_batch: 8, micro_batch: 2, steps: 3, lr: 3e-4}
output: {dir: runs/x}
"""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_name_alone_is_a_whole_section(name: str, tmp_path: Path) -> None:
    known = BENCHMARKS[name]
    (tmp_path / "r.yaml").write_text(BARE.replace("NAME", name))
    recipe = recipes.load(str(tmp_path / "r.yaml"))
    assert recipe.data.source == known.source
    assert recipe.data.format == known.format
    assert known.metrics, "a main score"
    assert set(known.metrics) <= set(SCORES)
    if known.format in FORMATS.names():
        check_settings(recipe.data)
    (tmp_path / "again.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(str(tmp_path / "again.yaml")) == recipe


def test_what_the_recipe_says_goes_before(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(BARE.replace("NAME", "sst2"))
    recipe = recipes.load(str(tmp_path / "r.yaml"), ["data.benchmark=rte", "data.source=here", "data.validation=null"])
    assert recipe.data.source == "here"
    assert recipe.data.labels == ["yes", "no"]
    assert recipe.data.validation is None
    (tmp_path / "again.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(str(tmp_path / "again.yaml")) == recipe, "null is not filled again"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'sst-2' is no benchmark\. Did you mean 'sst2'"):
        benchmark_of("sst-2")
