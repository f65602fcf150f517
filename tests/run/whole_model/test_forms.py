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


MUON = ["training.optimizer=muon", "vlora.lr_factors=auto", "vlora.decay_increments=false"]


@pytest.fixture(scope="module", params=["adamw", "muon"])
def more(request: pytest.FixtureRequest) -> list[str]:
    return [*FORM, *(MUON if request.param == "muon" else [])]


@pytest.fixture(scope="module")
def formed(more: list[str], tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    folder = tmp_path_factory.mktemp("forms") / "run"
    assert train(folder, *more) == 0
    return folder


def test_three_and_two_steps_are_five(formed: Path, more: list[str], tmp_path: Path) -> None:
    first, expected = state(formed, 1), state(formed, 5)
    assert not [name for name in first if name.startswith("master/") and torch.equal(first[name], expected[name])]
    assert metrics(formed, "vlora/increment/layer_00")[5] > 0, "the first layer adds an increment too"
    again = tmp_path / "run"
    shutil.copytree(formed, again)
    for step in (4, 5):
        shutil.rmtree(again / "checkpoints" / f"step-{step}")
    shutil.rmtree(again / "model")
    assert train(again, *more) == 0
    got = state(again, 5)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def test_zero_3_with_checkpointing_trains_alike(formed: Path, more: list[str], tmp_path: Path) -> None:
    assert train(tmp_path / "run", *more, "training.deepspeed=zero3", "model.gradient_checkpointing=true") == 0
    rounding = 1e-3 if MUON[0] in more else 1e-5  # Newton-Schulz steps are in bfloat16
    assert metrics(tmp_path / "run", "train/loss") == pytest.approx(metrics(formed, "train/loss"), rel=rounding)
    for layer in ("00", "03"):
        name = f"vlora/increment/layer_{layer}"
        assert metrics(tmp_path / "run", name) == pytest.approx(metrics(formed, name), rel=10 * rounding)


def test_plain_transformers_gives_the_same_logits(formed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert main(["merge", str(formed), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    model, tokenizer = unmerged(formed)
    torch.testing.assert_close(logits(merged, tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-5)


def test_what_is_shared_and_how_much_it_adds_is_shown(
    formed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vlora", "show", str(formed), "--out", str(tmp_path / "sizes.svg")]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("self_attn.q_proj"))
    assert "32 x 32  0-3" in line and "row column" in line
    line = next(line for line in said.splitlines() if line.startswith("mlp.down_proj"))
    assert "32 x 48  0+2, 1+3" in line and "diagonal" in line
    assert "All layers of a group add an increment" in said
    stored = [value for name, value in state(formed, 5).items() if name.startswith("master/") and "q_proj" in name]
    assert f"{sum(value.numel() for value in stored) / 1e6:.3f} M of {4 * 32 * 32 / 1e6:.3f} M" in said
    last = metrics(formed, "vlora/increment/layer_03")[5]
    assert said.splitlines()[-3].split()[0] == "3" and f"{last:.4g}" in said
    assert (tmp_path / "sizes.svg").read_text().startswith("<?xml")


def test_a_run_that_shares_nothing_or_another_ending_is_refused(
    formed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        ([str(formed), "--out", str(tmp_path / "sizes.gif")], "expected a name that ends with .png, .svg, .pdf"),
        ([str(tmp_path / "absent")], "absent"),
    ):
        assert main(["vlora", "show", *words]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
