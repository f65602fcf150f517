"""`glora-llm merge`: write, reload, compare, report; and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

from glora_llm.cli import main
from glora_llm.errors import CheckFailed, UserError
from glora_llm.merge.command import merge_run
from glora_llm.merge.sample import comparison_batches
from glora_llm.merge.verify import Answers, MergeReport, compare, require_within
from glora_llm.plan.plan import require_same_base
from glora_llm.schema import MergeSection
from glora_llm.training import checkpoint
from tests.merge.conftest import ALL_MODES, Train, Trained, logits

KEYS = {"max_abs_logit_diff", "top1_agreement", "loss_before", "loss_after", "tokens", "text"}


@pytest.fixture(scope="module")
def plain(train: Train) -> Trained:
    return train(slots=ALL_MODES, data={"test": 3})


@pytest.fixture(scope="module")
def quantised(train: Train) -> Trained:
    return train(slots=ALL_MODES, model={"quantization": "nf4"}, merge={"min_nf4_top1_agreement": 0.5})


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "merge_report.json").read_text())
    return found


def test_a_merge_reports_how_exact_it_was(plain: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge_run(plain.folder.path, tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert report.keys() == KEYS | {"latency"}
    assert report["latency"].keys() == {"merged_tokens_per_second", "base_tokens_per_second", "ratio", "measured"}
    assert report["latency"]["base_tokens_per_second"] > 0 and report["latency"]["ratio"] > 0
    assert report["max_abs_logit_diff"] < 1e-3 and report["top1_agreement"] == 1.0
    assert report["loss_before"] == pytest.approx(report["loss_after"], abs=1e-5) and report["loss_before"] > 1
    assert report["tokens"] > 50 and report["text"] == "4 validation rows"
    said = capsys.readouterr().out
    assert "max_abs_logit_diff" in said and "ratio" in said and "alternating passes over 1 x 64 tokens" in said
    assert "test_merged" not in plain.folder.summary()


def test_the_run_s_own_merge_is_scored(plain: Trained) -> None:
    merge_run(plain.folder.path, plain.folder.path / "merged")
    assert plain.folder.summary()["test_merged"]["test/loss"] > 1


def test_a_quantised_base_merges_dense(quantised: Trained, tmp_path: Path) -> None:
    merge_run(quantised.folder.path, tmp_path / "out")
    assert report_of(tmp_path / "out")["max_abs_logit_diff"] < 1e-3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), quantised.logits(), rtol=1e-4, atol=2e-4)


def test_quantised_again(quantised: Trained, tmp_path: Path) -> None:
    merge_run(quantised.folder.path, tmp_path / "out", quantize="nf4")
    report = report_of(tmp_path / "out")
    assert report.keys() == KEYS | {"requantised", "not_lossless", "latency"} and report["requantised"].keys() == KEYS
    assert report["max_abs_logit_diff"] < 1e-3 < report["requantised"]["max_abs_logit_diff"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bnb.nn.Linear4bit) and layer.bias is not None
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_quantised_again_and_too_different(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dense model stays, and the report has both."""
    trained = train(slots=ALL_MODES, model={"quantization": "nf4"}, merge={"min_nf4_top1_agreement": 1.0})
    assert main(["merge", str(trained.folder.path), "--out", str(tmp_path / "out"), "--quantize", "nf4"]) == 1
    said = capsys.readouterr().err
    assert "nf4 changes too many answers: top-1 agreement 0." in said
    assert f"The dense merged model is in {tmp_path / 'out'}, and no nf4 model was written." in said
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    report = report_of(tmp_path / "out")
    assert report["top1_agreement"] == 1.0 > report["requantised"]["top1_agreement"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(model), trained.logits(), rtol=1e-4, atol=2e-4)


def test_export_through_the_command(quantised: Trained, tmp_path: Path) -> None:
    merge_run(quantised.folder.path, tmp_path / "lora", to="lora")
    assert report_of(tmp_path / "lora")["max_abs_logit_diff"] < 1e-3
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_merge_outside_its_bounds_fails(train: Train, tmp_path: Path) -> None:
    trained = train(slots=ALL_MODES, merge={"dtype": "bfloat16", "max_loss_change": 1e-9, "min_top1_agreement": 0.0})
    said = r"the loss changed by .*, more than merge\.max_loss_change 1e-09.* It is in .*out\.failed"
    for _ in range(2):  # what failed before does not stand in the way
        with pytest.raises(CheckFailed, match=said):
            merge_run(trained.folder.path, tmp_path / "out")
        assert [file.name for file in tmp_path.iterdir()] == ["out.failed"]
    assert report_of(tmp_path / "out.failed")["max_abs_logit_diff"] > 1e-4


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), CheckFailed, r"not enough memory to verify .*out\.failed"),
        (ValueError("a defect"), ValueError, "a defect"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_a_merge_that_cannot_be_verified_is_set_aside(
    error: BaseException, raised: type, said: str, plain: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is never a finished-looking folder without a report, not even while it is verified."""

    def fail(folder: Path) -> None:
        assert not (tmp_path / "out").exists() and (folder / "config.json").is_file()
        raise error

    monkeypatch.setattr("glora_llm.merge.command.merged_model", fail)
    with pytest.raises(raised, match=said):
        merge_run(plain.folder.path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out.failed"]
    assert report_of(tmp_path / "out.failed") == {"error": f"not verified: {type(error).__name__}: {error}"}
    assert (tmp_path / "out.failed" / "model.safetensors").is_file()


@pytest.mark.parametrize("keys", [{"dtype": "float32"}, {"quantize": "nf4"}])
def test_a_lora_has_one_dtype(keys: dict[str, Any], plain: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype and --quantize are for --to model; a LoRA is written in float32"):
        merge_run(plain.folder.path, tmp_path / "out", to="lora", **keys)


def test_another_base_is_refused(train: Train, tmp_path: Path) -> None:
    trained = train(slots={"B": "lora"})
    file = trained.folder.path / "base.json"
    identity = json.loads(file.read_text())
    assert identity["fingerprint"] == trained.plan.base.fingerprint and identity["dtype"] == "float32"
    assert require_same_base(trained.folder, trained.plan) == torch.float32
    file.write_text(json.dumps(identity | {"fingerprint": "f" * 64}))
    said = f"trained on embedded:tiny-llama with fingerprint {'f' * 12}; .* has {identity['fingerprint'][:12]}"
    with pytest.raises(UserError, match=said):
        merge_run(trained.folder.path, tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=r"has no base\.json: its training never started"):
        merge_run(trained.folder.path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(plain: Trained, tmp_path: Path) -> None:
    for to in ("model", "lora"):
        with pytest.raises(UserError, match="exists already; name a new folder, or delete it"):
            merge_run(plain.folder.path, tmp_path, to=to)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder: it has no recipe\.yaml"):
        merge_run(tmp_path, tmp_path / "out")


@pytest.fixture
def with_checkpoints(train: Train) -> Trained:
    """A run with checkpoints of steps 2 and 4, whose adapters are those of the end."""
    trained = train(slots=ALL_MODES)
    for step in (2, 4):
        trainer = {"step": step, "seconds": 1.0, "applied": step, "data_digest": "0" * 64}
        checkpoint.write(
            trained.folder.checkpoints, step, trained.state, trainer, lambda path: copy(trained.folder.adapter, path)
        )
    return trained


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def test_a_kept_checkpoint_is_merged(with_checkpoints: Trained, tmp_path: Path) -> None:
    expected = with_checkpoints.logits()
    (with_checkpoints.folder.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no adapter: the run has not ended\. .* name a checkpoint by --step"):
        merge_run(with_checkpoints.folder.path, tmp_path / "out")
    merge_run(with_checkpoints.folder.path, tmp_path / "out", step=2)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_a_broken_checkpoint_is_named(with_checkpoints: Trained, tmp_path: Path) -> None:
    weights = with_checkpoints.folder.checkpoints / "step-4" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    said = r"step-4 is broken: adapter/adapter_model\.safetensors differs from what was written \(sha256\)"
    with pytest.raises(UserError, match=said):
        merge_run(with_checkpoints.folder.path, tmp_path / "out", step=4)
    weights.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"step-4 is broken: .* bytes, \d+ were written"):
        merge_run(with_checkpoints.folder.path, tmp_path / "out", step=4)
    with pytest.raises(UserError, match=r"has no checkpoint of step 3; kept: 4, 2\."):
        merge_run(with_checkpoints.folder.path, tmp_path / "out", step=3)
    assert not list(tmp_path.iterdir())


def report(**values: float) -> MergeReport:
    given: dict[str, Any] = {"max_abs_logit_diff": 0.0, "top1_agreement": 1.0, "loss_before": 1.0, "loss_after": 1.0}
    return MergeReport(**{**given, **values}, tokens=10, text="4 validation rows")


def test_bounds_are_inclusive() -> None:
    bounds = MergeSection(min_top1_agreement=0.75, max_loss_change=0.25)
    require_within(report(), bounds, "")
    require_within(report(top1_agreement=0.75, loss_after=1.25), bounds, "")
    require_within(report(loss_after=0.75), bounds, "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top1_agreement": 0.74}, "top-1 agreement 0.7400 is below merge.min_top1_agreement 0.75"),
        ({"loss_after": 1.26}, "the loss changed by 0.2600, more than merge.max_loss_change 0.25"),
        ({"loss_after": 0.74}, "the loss changed by 0.2600, more than merge.max_loss_change 0.25"),
        ({"loss_after": float("nan")}, "the loss changed by nan"),
        ({"top1_agreement": float("nan")}, "top-1 agreement nan"),
    ],
)
def test_outside_its_bounds_is_a_failed_check(values: dict[str, float], message: str) -> None:
    with pytest.raises(CheckFailed, match=re.escape(message)):
        bounds = MergeSection(min_top1_agreement=0.75, max_loss_change=0.25)
        require_within(report(**values), bounds, "Try --dtype float32.")


def test_the_comparison_by_hand() -> None:
    before = Answers(torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), 0.5)
    after = Answers(torch.tensor([[0.0, 1.0], [0.5, 0.0], [1.0, 0.0], [1.0, 0.0]]), 0.75)
    found = compare(before, after, "text")
    assert found == MergeReport(3.0, 0.75, 0.5, 0.75, 4, "text")


def test_the_comparison_reads_held_out_rows(plain: Trained, train: Train) -> None:
    batches, text = comparison_batches(plain.plan, plain.folder)
    (batch,) = batches
    assert text == "4 validation rows" and batch["input_ids"].shape[0] == 1
    assert len(batch["targets"]) and (batch["position_ids"] == 0).sum() == 4, "samples are told apart"
    without = train(slots={"B": "lora"}, data={"validation": None})
    assert comparison_batches(without.plan, without.folder)[1] == "16 train rows"
