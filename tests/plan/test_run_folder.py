"""A run folder belongs to one recipe: what may change on the way, what may not, and what is said then."""

import json
from pathlib import Path

import pytest

from glora_llm import recipe as recipes
from glora_llm.errors import UserError
from glora_llm.plan.run_folder import FREE_KEYS, FREE_SECTIONS, RunFolder
from glora_llm.schema import Recipe

FREE = [
    "training.deepspeed=zero3", "training.micro_batch=2", "training.log_every=5", "training.max_bad_steps=2",
    "training.deterministic=true", "output.max_hours=1.5",
    "model.attention=eager", "model.dtype=bfloat16", "model.kernels=none", "model.gradient_checkpointing=true",
    "model.compile=true",
    "evaluation.every=5", "evaluation.batch=3", "merge.after_training=true", "merge.dtype=bfloat16",
    "output.save_every=3", "output.keep=9", "output.resume=must", "search.passes=3",
    "data.revisions={someone/set: main}", "description=other",
]  # fmt: skip
BOUND = [
    "training.lr=0.5", "training.steps=21", "training.global_batch=32", "training.seed=1", "training.betas=[0.9, 0.99]",
    "model.quantization=nf4", "adapter.rank=5", "adapter.slots.A=none", "adapter.alpha=9.0",
    "data.max_rows=300", "data.packing=true", "data.prompt='{text}'",
]  # fmt: skip


def tiny(*overrides: str) -> Recipe:
    plain = [text for text in overrides if not text.startswith("description=")]
    made = recipes.load("tiny_cpu", plain)
    return made.model_copy(update={"description": "other"}) if len(plain) < len(overrides) else made


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.write("recipe.yaml", recipes.dump(tiny()))
    return made


def test_the_list_of_free_keys_is_tested_whole() -> None:
    named = {override.partition("=")[0] for override in FREE}
    assert {f"{section}.{key}" for section, keys in FREE_KEYS.items() for key in keys} <= named
    assert {name.partition(".")[0] for name in named} >= FREE_SECTIONS


@pytest.mark.parametrize("override", FREE, ids=lambda text: text.partition("=")[0])
def test_a_run_goes_on_with_a_free_key_changed(override: str, folder: RunFolder) -> None:
    changed = tiny(override)
    assert changed != tiny()
    folder.require_same_run(changed)


@pytest.mark.parametrize("override", BOUND, ids=lambda text: text.partition("=")[0])
def test_another_value_makes_it_another_run(override: str, folder: RunFolder) -> None:
    changed = tiny(override)
    name = override.partition("=")[0]
    key = "adapter.slots" if name.startswith("adapter.slots") else name
    section, _, field = key.partition(".")
    there, here = ((r.model_dump(mode="json")[section][field]) for r in (tiny(), changed))
    with pytest.raises(UserError) as caught:
        folder.require_same_run(changed)
    assert f"{folder.path} holds a run of another recipe (" in str(caught.value)
    assert f"{key}: {there!r} there, {here!r} here" in str(caught.value)
    assert "Choose another output.dir, or delete it." in str(caught.value)


def test_several_differences_are_listed_and_free_ones_are_not(folder: RunFolder) -> None:
    changed = tiny("training.lr=0.5", "adapter.rank=2", "output.keep=9", "model.quantization=nf4")
    with pytest.raises(UserError) as caught:
        folder.require_same_run(changed)
    message = str(caught.value)
    assert "adapter.rank: 4 there, 2 here; model.quantization: 'none' there, 'nf4' here; training.lr: 0.01" in message
    assert "keep" not in message


def test_a_recipe_survives_the_folder(folder: RunFolder) -> None:
    assert folder.recipe() == tiny()
    folder.require_same_run(folder.recipe())


def test_a_new_folder_belongs_to_anyone(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").require_same_run(tiny())
    assert not (tmp_path / "new").exists()
    RunFolder(tmp_path).require_same_run(tiny())


def test_checkpoints_without_a_recipe_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has checkpoints but no recipe\.yaml; choose another output\.dir"):
        RunFolder(tmp_path).require_same_run(tiny())


@pytest.mark.parametrize("there", [False, True])
def test_no_run_folder(there: bool, tmp_path: Path) -> None:
    path = tmp_path if there else tmp_path / "absent"
    with pytest.raises(UserError, match=r"is no run folder: it has no recipe\.yaml\. Give the output\.dir"):
        RunFolder(path).recipe()


def test_a_summary_grows(folder: RunFolder) -> None:
    assert folder.summary() == {}
    folder.update_summary({"steps": 20, "test": {"test/loss": 2.5}})
    folder.update_summary({"test": {"test/loss": 2.0}, "seconds": 3.5})
    expected = {"steps": 20, "test": {"test/loss": 2.0}, "seconds": 3.5}
    assert folder.summary() == json.loads((folder.path / "summary.json").read_text()) == expected
    assert {path.name for path in folder.path.iterdir()} == {"recipe.yaml", "summary.json"}


BASE = {"name": "some/base", "revision": None, "fingerprint": "a" * 64, "dtype": "float32"}


def test_a_run_goes_on_with_its_base_only(folder: RunFolder) -> None:
    """W0 is part of what GLoRA trains: other weights, or weights rounded otherwise, make another adapter of it."""
    assert folder.base() == {}
    folder.require_same_base(BASE)
    folder.write("base.json", json.dumps(BASE))
    folder.require_same_base(BASE | {"name": "moved/base"})
    with pytest.raises(
        UserError, match=r"trained on some/base with fingerprint aaaaaaaaaaaa; other has bbbbbbbbbbbb\."
    ):
        folder.require_same_base(BASE | {"name": "other", "fingerprint": "b" * 64})
    with pytest.raises(UserError, match=r"trained in float32, .* go on in bfloat16\. Set model\.dtype=float32"):
        folder.require_same_base(BASE | {"dtype": "bfloat16"})
    assert folder.base() == BASE


def test_the_paths_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert (folder.checkpoints, folder.adapter) == (tmp_path / "checkpoints", tmp_path / "adapter")


def test_model_and_data_of_the_hub_stay_at_the_commits_that_the_run_began_with(tmp_path: Path) -> None:
    recipe, commit = tiny("model.name_or_path=someone/tiny"), "0123456789abcdef0123456789abcdef01234567"
    run = RunFolder(tmp_path / "run")
    assert run.pinned(recipe) == recipe, "a new run asks for the newest"
    run.write("recipe.yaml", recipes.dump(recipe))
    run.write("base.json", json.dumps(BASE | {"name": "someone/tiny", "revision": commit}))
    assert run.pinned(recipe).model.revision == run.recipe().model.revision == commit
    assert run.written_recipe() == recipe
    run.require_same_run(recipe)
    named = tiny("model.name_or_path=someone/tiny", "model.revision=v2")
    assert run.pinned(named) == named, "what a recipe names itself is not replaced"
    run.write("base.json", json.dumps(BASE | {"data": {"someone/set": commit}}))
    assert run.pinned(recipe).data.revisions == run.recipe().data.revisions == {"someone/set": commit}
    run.require_same_run(run.pinned(recipe))
    given = tiny("model.name_or_path=someone/tiny", "data.revisions={someone/set: v2}")
    assert run.pinned(given).data.revisions == {"someone/set": "v2"}
    with pytest.raises(UserError, match=r"model\.revision: None there, 'v2' here"):
        run.require_same_run(named)
