"""The memory that a merge takes, verification included, is that of a few layers, however many the model has."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from glora_llm import recipe as recipes
from glora_llm.models.random_llama import TINY, write_random_llama
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.claim import base_identity
from glora_llm.schema import Recipe
from tests.merge.conftest import ALL_MODES, CPU, Train

SHAPE = replace(TINY, layers=16, hidden=1024, intermediate=2816, heads=8, kv_heads=8, std=0.02)
MODEL_BYTES = 16 * 4 * (4 * 1024**2 + 3 * 1024 * 2816)  # float32, in files and in memory
MOST = 0.35


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 16 layers in one file of 0.8 GB."""
    folder = tmp_path_factory.mktemp("base")
    write_random_llama(folder, SHAPE, seed=0)
    return folder


def trained_whole(make_recipe: Callable[..., Recipe], base: Path, folder: RunFolder) -> None:
    """Write a run that trained the base as a whole, by nothing; the plan is made as the run would make it."""
    recipe = make_recipe(folder.path, {"method": "full"}, model={"name_or_path": str(base)}, merge=MERGE)
    folder.write("recipe.yaml", recipes.dump(recipe))
    folder.write("base.json", json.dumps(base_identity(make_plan(recipe), CPU)))
    shutil.copytree(base, folder.model)


MERGE = {"dtype": "bfloat16", "max_shard_gb": 0.05, "min_top1_agreement": 0.5, "max_loss_change": 1.0}


def test_a_merge_takes_a_share_of_the_model(
    base: Path, train: Train, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    adapted = train(std=1e-3, slots=ALL_MODES, model={"name_or_path": str(base)}, merge=MERGE).folder
    whole = RunFolder(tmp_path / "whole")
    trained_whole(make_recipe, base, whole)
    runs = [str(adapted.path), str(whole.path)]
    command = [sys.executable, "-m", "tests.merge.peak_worker", *runs, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    shares = {name: peak / MODEL_BYTES for name, peak in peaks.items()}
    assert len(shares) == 2 and max(shares.values()) < MOST, shares
