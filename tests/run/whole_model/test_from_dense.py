"""`vlora from-dense --budget --distill` on a tiny LLaMA: one command, resumed bit for bit, merged; what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from glora_llm.cli import main
from glora_llm.launch import ranks
from glora_llm.models.embedded import embedded_folder
from glora_llm.models.folder import read_sharing
from glora_llm.vlora import UnequalSharing
from tests.in_process import alone, forget_launch, one_thread
from tests.run.whole_model.conftest import SHIPPED

__all__ = ["alone", "one_thread"]
MODEL, BUDGET = "embedded:tiny-llama", 0.8


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    parts = SHIPPED.read_text(encoding="utf-8").split("\n\n")[:80]
    file.write_text("".join(json.dumps({"text": f"{part} é"}) + "\n" for part in parts))
    return file


def command(out: Path, text: Path, *more: str) -> int:
    """The command in this process, small: four steps of four rows of 32 tokens."""
    words = ["vlora", "from-dense", MODEL, "--budget", str(BUDGET), "--data", str(text), "--steps", "4", "--distill"]
    small = ["data.max_tokens=32", "data.validation=0.1", "training.global_batch=4", "training.micro_batch=2",
             "model.dtype=float32", "merge.dtype=float32", "model.from_dense.calibration_rows=2",
             "training.distill.temperature=2.0", "training.distill.states=0.1"]  # fmt: skip
    try:
        return main([*words, "--out", str(out), *small, *more])
    finally:
        ranks.stop()
        forget_launch()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path, alone: None) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert command(out, text) == 0
    return out


def test_the_run_says_what_was_lost_and_keeps_the_budget(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    losses = [summary[key]["validation/loss"] for key in ("teacher", "at_start", "validation")]
    assert losses[0] != losses[1] != losses[2] and all(0 < loss < 20 for loss in losses)
    sharing = read_sharing(run / "model")
    assert isinstance(sharing, UnequalSharing) and any(group.count == 2 for group in sharing.groups)
    dense = AutoModelForCausalLM.from_pretrained(embedded_folder("tiny-llama"))
    linears = [name for name, _ in dense.named_parameters() if name.endswith("_proj.weight")]
    full = sum(dense.get_parameter(name).numel() for name in linears)
    stored = load_file(run / "model" / "model.safetensors")
    assert sum(stored[name].numel() for name in stored if "_proj." in name) <= BUDGET * full
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == 4
    for step in steps:
        mixed = 0.5 * step["train/cross_entropy"] + 0.5 * step["train/divergence"] + 0.1 * step["train/states"]
        assert step["train/loss"] == pytest.approx(mixed, rel=1e-5)
    assert summary["validation"]["validation/bits_per_byte"] > 0


def test_the_merged_model_is_plain_and_gives_the_same_logits(run: Path) -> None:
    from glora_llm.models.load import load_base
    from glora_llm.schema import ModelSection

    ids = torch.tensor([[1, 5, 9, 13, 17]])
    plain = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    mine = load_base(ModelSection(name_or_path=str(run / "model"), dtype="float32"), run / "model", torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, mine(ids).logits, rtol=1e-4, atol=1e-5)
    assert not (run / "merged" / "vlora.json").exists()


def test_the_same_command_goes_on_bit_for_bit(run: Path, text: Path, tmp_path: Path) -> None:
    out, every = tmp_path / "run", ["output.save_every=1"]
    assert command(out, text, *every, "output.stop_after=2") == 75
    assert command(out, text, *every) == 0
    first, again = (load_file(folder / "model" / "model.safetensors") for folder in (run, out))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert json.loads((out / "summary.json").read_text())["teacher"]


def test_what_was_lost_is_said_though_the_merged_model_is_refused(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "merged")
    assert command(tmp_path / "run", text, "merge.dtype=bfloat16", "merge.min_top1_agreement=1") == 1
    said = capsys.readouterr()
    assert "check failed: top-1 agreement" in said.err and "trained on" in said.out


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_other_stages_train_the_same(stage: str, run: Path, text: Path, tmp_path: Path) -> None:
    assert command(tmp_path / "run", text, f"training.deepspeed={stage}", "merge.after_training=false") == 0
    first, other = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "run"))
    for name in first:
        torch.testing.assert_close(other[name], first[name], rtol=1e-3, atol=1e-4)


def test_a_teacher_in_four_bits(run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And where three kinds of linears alone may share."""
    more = ["training.distill.quantization=nf4", "training.deepspeed=zero3", "merge.after_training=false"]
    assert command(tmp_path / "run", text, *more, "model.from_dense.targets=[q_proj, up_proj, down_proj]") == 0
    sharing = read_sharing(tmp_path / "run" / "model")
    assert isinstance(sharing, UnequalSharing)
    kinds = {group.linear for group in sharing.groups}
    assert kinds == {"self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"}
    said = capsys.readouterr().out
    assert "truncated SVD alone" in said and "1.000 x the teacher's" in said
    assert "by what their errors do to the loss" in said and "estimated rise of the loss before any training: " in said
    exact, rounded = (
        json.loads((folder / "summary.json").read_text())["teacher"]["validation/loss"]
        for folder in (run, tmp_path / "run")
    )
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.02)
    assert main(["evaluate", str(tmp_path / "run"), "--split", "validation"]) == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["model.from_dense.budget=0.01"], "No sharing of these layers has as few as"),
        (["training.distill.teacher=no/such/teacher!"], "no/such/teacher!"),
        (["adapter.method=lora"], "model.from_dense makes a model whose weights are trained on"),
        (["training.distill.weight=2"], "training.distill.weight"),
        (["vlora.rank=4"], "The section vlora is for a new model"),
    ],
)
def test_refused(more: list[str], says: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path / "run", text, *more) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_teacher_with_another_tokenizer(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(embedded_folder("tiny-llama"), tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["a new piece"])
    tokenizer.save_pretrained(tmp_path / "other")
    assert command(tmp_path / "run", text, f"training.distill.teacher={tmp_path / 'other'}") == 2
    assert "has another tokenizer than the model" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--budget", "0.5", "--steps", "5", "--distill"],
            "--distill learns from a teacher's answers to text: give --data",
        ),
        (["--budget", "0.5", "--data", "x.jsonl"], "give --steps N"),
        (["--budget", "x", "--data", "x.jsonl", "--steps", "5"], "--budget is 'x'"),
        (["--budget", "1.5", "--data", "x.jsonl", "--steps", "5"], "model.from_dense.budget"),
        (
            ["--budget", "0.5", "--data", "x.jsonl", "--steps", "5", "--base", "first"],
            "--base is for --rank: with --budget the layers that share follow",
        ),
        (["--rank", "4", "--distill"], "--data, --steps, --distill and overrides train a model of --budget"),
    ],
)
def test_options_that_do_not_fit(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vlora", "from-dense", MODEL, *words, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()
