"""Forms of sharing beside the paper's through a whole run: resumed, at ZeRO 3, scored, merged."""

import shutil
from pathlib import Path

import pytest
import torch

from glora_llm.cli import main
from tests.run.whole_model.conftest import train
from tests.run.whole_model.test_merge import logits, unmerged
from tests.run.whole_model.test_train import state
from tests.training.launching import metrics

FORM = [
    "vlora.layers_per_compound={q_proj: 4, k_proj: 4, v_proj: 4, o_proj: 4, gate_proj: 2, up_proj: 2, down_proj: 2}",
    "vlora.gains={q_proj: [row, column], down_proj: [diagonal]}", "vlora.increments=all", "vlora.sharing=cycle",
    "vlora.start=small", "vlora.norm_spread=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    folder = tmp_path_factory.mktemp("forms") / "run"
    assert train(folder, *FORM) == 0
    return folder


def test_three_and_two_steps_are_five(formed: Path, tmp_path: Path) -> None:
    first, expected = state(formed, 1), state(formed, 5)
    assert not [name for name in first if name.startswith("master/") and torch.equal(first[name], expected[name])]
    assert metrics(formed, "vlora/increment/layer_00")[5] > 0, "the first layer adds an increment too"
    again = tmp_path / "run"
    shutil.copytree(formed, again)
    for step in (4, 5):
        shutil.rmtree(again / "checkpoints" / f"step-{step}")
    shutil.rmtree(again / "model")
    assert train(again, *FORM) == 0
    got = state(again, 5)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def test_zero_3_with_checkpointing_trains_alike(formed: Path, tmp_path: Path) -> None:
    more = ["training.deepspeed=zero3", "model.gradient_checkpointing=true"]
    assert train(tmp_path / "run", *FORM, *more) == 0
    assert metrics(tmp_path / "run", "train/loss") == pytest.approx(metrics(formed, "train/loss"), rel=1e-5)
    for layer in ("00", "03"):
        name = f"vlora/increment/layer_{layer}"
        assert metrics(tmp_path / "run", name) == pytest.approx(metrics(formed, name), rel=1e-4)


def test_plain_transformers_gives_the_same_logits(formed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert main(["merge", str(formed), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    model, tokenizer = unmerged(formed)
    torch.testing.assert_close(logits(merged, tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-5)
