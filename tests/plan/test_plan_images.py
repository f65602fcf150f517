"""Every recipe of images dry runs, on generated images and a small model where theirs are not here."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from glora_llm import recipe as recipes
from glora_llm.plan.overview import describe
from glora_llm.plan.plan import make_plan
from glora_llm.schema import Recipe
from tests.in_process import alone
from tests.plan.local_recipes import dry_run
from tests.plan.test_plan import EVERY

__all__ = ["alone"]
NAMES = [name for name in EVERY if recipes.load(name).data.format == "images"]


def local(name: str, tmp_path: Path) -> Recipe:
    """A shipped recipe on generated images; a pretrained model becomes a small one with the names of older files."""
    plain = recipes.load(name)
    changes = ["data.source=embedded:shapes", "data.split=train", "data.validation=64", "data.test=test"]
    changes += [f"output.dir={tmp_path / 'run'}"]
    if plain.model.config is None:
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = ViTConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=4, num_labels=1000)
        ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        changes += [f"model.name_or_path={tmp_path / 'vit'}", "data.images.size=16"]
    return recipes.load(name, changes)


def test_there_are_recipes_of_images() -> None:
    assert {"vit_cifar10_vlora", "vit_cifar10_dense", "vit_cifar10_glora", "vit_cifar10_vlora_tiny"} <= set(NAMES)
    assert {f"vit_{task}_{kind}" for task in ("fewshot", "vtab", "cifar100") for kind in ("glora", "lora")} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_of_images_dry_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = local(name, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    text, lines = dry_run(recipe, capsys)
    assert "not computed for image classifiers" in lines["memory"]
    assert re.fullmatch(rf"{recipe.adapter.method}, \d+\.\d+ M trained \(\d+\.\d+ %\)", lines["adapter"])
    assert ("vlora" in lines) == (recipe.vlora is not None)
    if recipe.adapter.method == "noah":
        assert lines["merge"].startswith("An adapter of method noah cannot be merged: its adapters and prompts")
    else:
        assert lines["merge"] == "possible into a plain transformers model"
    assert text.count("images of 16 x 16 pixels; 6 classes of ") == 3
    assert {path.name for path in tmp_path.iterdir()} == before
    assert not torch.distributed.is_initialized()


def test_vlora_trains_at_most_30_percent_of_the_dense_model(tmp_path: Path) -> None:
    trained = []
    for kind in ("vlora", "dense"):
        text = describe(make_plan(local(f"vit_cifar10_{kind}", tmp_path), world_size=1))
        found = re.search(r"full, (\d+\.\d+) M trained", text)
        assert found
        trained.append(float(found[1]))
    assert trained[0] < 0.3 * trained[1]
