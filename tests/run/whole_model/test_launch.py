"""Two gloo ranks under ZeRO 3 train a VLoRA language model: as one rank does, resumed bit for bit, then merged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from glora_llm.evaluation.trained import load_adapted
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.training.checkpoint import fault
from tests.run.whole_model.conftest import overrides
from tests.run.whole_model.test_merge import logits
from tests.training.launching import ROOT, finished, launch, metrics

pytestmark = pytest.mark.launch


def train_on_two(out: Path) -> None:
    """Under ZeRO 3 with nothing persistent: parameters as small as these would never be split else."""
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    stage3 = out.parent / "zero3.json"
    stage3.write_text(json.dumps(config))
    more = [f"training.deepspeed={stage3}", "merge.after_training=true", "merge.dtype=float32"]
    done = finished(launch("train.py", "--recipe", "vlora_lm_tiny", *overrides(out), *more))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, alone: None) -> tuple[Path, Path]:
    """A finished run on two ranks, and its twin that was stopped after step 3 and started again."""
    folder = tmp_path_factory.mktemp("two")
    train_on_two(folder / "run")
    stopped = folder / "stopped"
    shutil.copytree(folder / "run", stopped)
    for name in ("model", "merged", "checkpoints/step-4", "checkpoints/step-5"):
        shutil.rmtree(stopped / name)
    (stopped / "summary.json").unlink()
    (stopped / "checkpoints" / ".writing-step-4").mkdir()
    train_on_two(stopped)
    return folder / "run", stopped


def test_two_ranks_train_as_one(two_ranks: tuple[Path, Path], run: Path) -> None:
    together, _ = two_ranks
    assert metrics(together, "train/loss") == pytest.approx(metrics(run, "train/loss"), rel=1e-5)
    got, expected = (load_file(folder / "model" / "model.safetensors") for folder in (together, run))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=2e-5, msg=name)
    sizes = metrics(together, "vlora/increment/layer_03")
    assert len(sizes) == 5 and sizes == pytest.approx(metrics(run, "vlora/increment/layer_03"), rel=1e-3)


def test_a_stopped_run_ends_as_the_other(two_ranks: tuple[Path, Path]) -> None:
    whole, stopped = two_ranks
    states = [load_file(folder / "checkpoints" / "step-5" / "state.safetensors") for folder in two_ranks]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert fault(stopped / "checkpoints" / "step-5") is None
    for file in ("model/model.safetensors", "model/vlora.json", "merged/model.safetensors"):
        assert (whole / file).read_bytes() == (stopped / file).read_bytes(), file


def test_the_merged_model_answers_as_the_trained_one(two_ranks: tuple[Path, Path]) -> None:
    run, _ = two_ranks
    plain = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    plan = make_plan(RunFolder(run).recipe())
    tokenizer = plan.task.tokenizer  # type: ignore[attr-defined]
    trained = load_adapted(plan, run / "model")
    torch.testing.assert_close(logits(plain, tokenizer), logits(trained, tokenizer), rtol=1e-5, atol=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["trained_parameters"] == sum(p.numel() for p in trained.parameters())
