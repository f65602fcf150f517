"""`search.finetune_steps`: the genome is trained further from the weights that it inherits, as a run of its own."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from glora_llm.cli import main
from glora_llm.evaluation.scoring import score_model
from glora_llm.evaluation.trained import load_adapted
from glora_llm.glora.layer import GLoRALinear
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from tests.merge.conftest import logits
from tests.run.supernet.conftest import Copy, train
from tests.run.test_train import contents, write_rows

SEARCH = [
    "search.budget=3k", "search.passes=6", "search.finetune_steps=2", "merge.after_training=true",
    "evaluation.test_before=true", "adapter.modules_to_save=[lm_head]",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    """A supernet that also trains the output head whole: searched, fine-tuned and merged by one command."""
    folder = tmp_path_factory.mktemp("finetuned")
    assert train(write_rows(folder / "data.jsonl", 60), folder / "run", *SEARCH) == 0
    return folder / "run"


def test_it_starts_from_the_inherited_weights(run: Path) -> None:
    """Before its first step it scores as the genome scored in the supernet, on test rows and on validation rows."""
    whole, tuned = RunFolder(run).summary(), RunFolder(run / "finetuned").summary()
    assert tuned["test_before"] == pytest.approx(whole["test_genome"], rel=1e-6)
    start = load_adapted(make_plan(RunFolder(run).recipe()), run / "search" / "adapter")
    scores = score_model(make_plan(RunFolder(run / "finetuned").recipe()), start, "validation")
    assert scores["validation/loss"] == pytest.approx(-whole["search"]["3k"]["score"], rel=1e-6)
    assert tuned["trained_parameters"] - 260 * 64 == whole["search"]["3k"]["parameters"]


def test_it_is_a_run_of_its_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = run / "finetuned"
    names = {path.name for path in tuned.iterdir()}
    assert names >= {"recipe.yaml", "base.json", "metrics.jsonl", "summary.json", "checkpoints", "adapter", "merged"}
    steps = [json.loads(line)["step"] for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert set(steps) == {1, 2} and RunFolder(tuned).summary()["steps"] == 2
    start, end = (
        load_file(folder / "adapter_model.safetensors") for folder in (run / "search/adapter", tuned / "adapter")
    )
    assert start.keys() == end.keys()
    assert all(start[name].shape == end[name].shape for name in start)
    assert any(not torch.equal(start[name], end[name]) for name in start)
    capsys.readouterr()
    assert main(["evaluate", str(tuned)]) == 0
    assert f"{RunFolder(tuned).summary()['test']['test/loss']:.4f}" in capsys.readouterr().out


def test_it_may_be_moved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run holds a copy of its genome, wherever the file that its recipe names has gone."""
    shutil.copytree(run / "finetuned", tmp_path / "moved")
    recipe = tmp_path / "moved" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(run), str(tmp_path / "gone")))
    assert str(tmp_path / "gone") in recipe.read_text()
    assert main(["evaluate", str(tmp_path / "moved")]) == 0
    assert f"{RunFolder(run / 'finetuned').summary()['test']['test/loss']:.4f}" in capsys.readouterr().out


def test_it_is_what_was_merged(run: Path) -> None:
    assert not (run / "merged").exists()
    merged = AutoModelForCausalLM.from_pretrained(run / "finetuned" / "merged", dtype=torch.float32).eval()
    plan = make_plan(RunFolder(run / "finetuned").recipe())
    expected = logits(load_adapted(plan, run / "finetuned" / "adapter"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_another_search_does_not_touch_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps its own genome: it still merges, and training on is refused instead of mixing the two."""
    chosen, before = (run / "genome.json").read_text(), contents(run / "finetuned")
    try:
        assert main(["search", str(run), "--budget", "1k"]) == 0
        assert (run / "genome.json").read_text() != chosen
        assert main(["merge", str(run / "finetuned"), "--out", str(tmp_path / "merged")]) == 0
        capsys.readouterr()
        assert train(run.with_name("data.jsonl"), run, *SEARCH) == 2
        assert "finetuned was trained from another genome than " in capsys.readouterr().err
    finally:
        (run / "genome.json").write_text(chosen)
    assert contents(run / "finetuned") == before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    same = AutoModelForCausalLM.from_pretrained(run / "finetuned" / "merged", dtype=torch.float32).eval()
    assert torch.equal(logits(merged), logits(same))


def test_training_again_finds_all_of_it_done(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (run / "finetuned" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert train(run.with_name("data.jsonl"), run, *SEARCH) == 0
    said = capsys.readouterr().out
    assert "training had ended already, after step 3" in said and "training had ended already, after step 2" in said
    assert (run / "finetuned" / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_a_launch_that_ended_before_its_fine_tuning_goes_on_with_it(run: Path, copy_of: Copy) -> None:
    """Also where a checkpoint is asked for: the supernet has one, and fine-tuning has none yet.

    Neither of its two models is held behind its end: the second is loaded into the memory of the first.
    """
    again, before = copy_of(run), layers_alive()
    shutil.rmtree(again / "finetuned")
    assert train(run.with_name("data.jsonl"), again, *SEARCH, "output.resume=must") == 0
    weights = [folder / "finetuned" / "adapter" / "adapter_model.safetensors" for folder in (run, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert layers_alive() == before


def layers_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, GLoRALinear) for thing in gc.get_objects())
