"""A whole model becomes a plain dense checkpoint; adapters on a VLoRA folder; VLoRA of a dense model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from glora_llm.cli import main
from glora_llm.evaluation.trained import load_adapted, stream_adapted
from glora_llm.models.load import load_base
from glora_llm.models.stored import stored_tensors
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.schema import ModelSection
from glora_llm.vlora import Parts, compose, to_dense, vlora_layers
from tests.run.whole_model.conftest import SHIPPED, train

TEXT = "First Citizen:\nSpeak, speak."


def unmerged(run: Path, folder: Path | None = None) -> tuple[Any, Any]:
    """The model as it was trained, and its tokenizer."""
    plan = make_plan(RunFolder(run).recipe())
    tokenizer: Any = plan.task.tokenizer  # type: ignore[attr-defined]
    return load_adapted(plan, folder or RunFolder(run).trained(plan.recipe)), tokenizer


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    return model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits


def merge(run: Path, out: Path, *more: str) -> int:
    return main(["merge", str(run), "--out", str(out), "--dtype", "float32", *more])


def test_a_merged_model_is_plain(run: Path, tmp_path: Path) -> None:
    """Stock transformers loads it, with the logits of the VLoRA model and nothing of ours."""
    assert merge(run, tmp_path / "merged") == 0
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "merge_report.json"
    }  # fmt: skip
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not vlora_layers(plain) and plain.config.use_cache is True
    model, tokenizer = unmerged(run)
    assert vlora_layers(model)
    torch.testing.assert_close(logits(plain, tokenizer), logits(model, tokenizer), rtol=1e-5, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT).input_ids == tokenizer(TEXT).input_ids
    values = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert values["max_abs_logit_diff"] < 1e-5 and values["top1_agreement"] == 1.0


def test_layers_that_share_weights_are_read_one_by_one(run: Path) -> None:
    """A layer's base is that of the first layer of its compound, which is read for each of them."""
    plan = make_plan(RunFolder(run).recipe())
    streamed = stream_adapted(plan, RunFolder(run).model, torch.device("cpu"), torch.float32)
    model, tokenizer = unmerged(run)
    assert streamed is not None and vlora_layers(streamed).keys() == vlora_layers(model).keys()
    assert torch.equal(logits(streamed, tokenizer), logits(model, tokenizer))


def test_a_checkpoint_can_be_merged(run: Path, tmp_path: Path) -> None:
    assert merge(run, tmp_path / "merged", "--step", "2") == 0
    stored = load_file(run / "checkpoints" / "step-2" / "state.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    base = stored["master/model.layers.0.mlp.up_proj.weight"]
    factors = [[stored[f"master/{name}.increment_{letter}"]] for letter in "ba"]
    weight = compose(Parts(base, factors[0], factors[1]), 1.0)
    assert torch.equal(merged[f"{name}.weight"], weight)
    assert not list(run.glob(".merge-*"))


def test_the_merged_model_of_a_run_is_scored(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    assert merge(again, again / "merged") == 0
    capsys.readouterr()
    scores = []
    for more in ([], ["--merged", str(again / "merged")]):
        assert main(["evaluate", str(again), "--split", "validation", *more]) == 0
        scores.append(capsys.readouterr().out)
    assert scores[0] == scores[1] and "validation/perplexity" in scores[0]
    loss = json.loads((run / "summary.json").read_text())["validation"]["validation/loss"]
    assert f"{loss:.4f}" in scores[0]


def no_model(run: Path) -> None:
    shutil.rmtree(run / "model")


def cut_off(run: Path) -> None:
    file = run / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_weights(run: Path) -> None:
    (run / "model" / "model.safetensors").unlink()


def never_began(run: Path) -> None:
    (run / "base.json").unlink()


@pytest.mark.parametrize(
    ("damage", "more", "said"),
    [
        (no_model, [], "config.json is missing. To get it back, start the same training command again"),
        (cut_off, [], "is damaged or cut off"),
        (no_weights, [], "holds no weights"),
        (never_began, [], "has no base.json: its training never started"),
        (no_model, ["--step", "9"], "has no checkpoint of step 9; kept: 5, 4, 3, 2, 1"),
        (lambda run: None, ["--to", "lora"], "--to lora exports GLoRA adapters, and"),
    ],
)
def test_a_half_written_run_is_not_merged(
    run: Path, tmp_path: Path, damage: Any, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    damage(broken)
    assert main(["merge", str(broken), "--out", str(tmp_path / "merged"), *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("method", ["glora", "lora"])
def test_an_adapter_on_a_vlora_model_trains_and_merges(run: Path, tmp_path: Path, method: str) -> None:
    base = ["vlora=null", "model.config=null", "model.tokenizer=null", f"model.name_or_path={run / 'model'}"]
    adapter = [f"adapter.method={method}", "adapter.rank=2", "training.lr=0.02"]
    assert train(tmp_path / "run", *base, *adapter, "training.steps=3") == 0
    model, tokenizer = unmerged(tmp_path / "run")
    assert len(vlora_layers(model)) == 14, "the base is shared still"
    before, _ = unmerged(run)
    assert (logits(model, tokenizer) - logits(before, tokenizer)).abs().max() > 1e-2
    assert merge(tmp_path / "run", tmp_path / "merged") == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(plain, tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-5)
    if method == "glora":
        assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "lora"), "--to", "lora"]) == 0


def test_a_vlora_model_is_trained_further(run: Path, tmp_path: Path) -> None:
    base = ["vlora=null", "model.config=null", "model.tokenizer=null", f"model.name_or_path={run / 'model'}"]
    assert train(tmp_path / "run", *base, "training.steps=2") == 0
    model, _ = unmerged(tmp_path / "run")
    assert len(vlora_layers(model)) == 14
    first = json.loads((tmp_path / "run" / "metrics.jsonl").open().readline())["train/loss"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])["train/loss"]
    assert abs(first - last) < 0.3, "it goes on where the other run ended"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_reads_as_the_dense_model_it_computes(run: Path, dtype: torch.dtype) -> None:
    section = ModelSection(name_or_path="x", dtype="float32" if dtype == torch.float32 else "bfloat16")
    stored = stored_tensors(run / "model", section, dtype)
    dense = dict(to_dense(load_base(section, run / "model", torch.device("cpu"))).named_parameters())
    assert set(stored.names()) == set(dense) and "model.layers.1.mlp.up_proj.increment_a" not in stored
    for name, weight in dense.items():
        assert name in stored and torch.equal(stored.get(name).to(dtype), weight), name
    assert stored.numbers() == sum(weight.numel() for weight in dense.values())


def test_from_dense_at_full_rank_answers_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["vlora", "from-dense", "embedded:tiny-llama", "--layers-per-compound", "all", "--out"]
    assert main([*command, str(tmp_path / "full"), "--rank", "full,4"]) == 0
    assert main([*command, str(tmp_path / "mean"), "--rank", "full", "--base", "mean"]) == 0
    printed = capsys.readouterr().out
    assert "rank full" in printed and "rank 4" in printed and "self_attn.q_proj" in printed
    section = ModelSection(name_or_path=str(tmp_path / "full"), dtype="float32")
    made = load_base(section, tmp_path / "full", torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "full")
    from glora_llm.models.embedded import embedded_folder

    dense = AutoModelForCausalLM.from_pretrained(embedded_folder("tiny-llama"), dtype=torch.float32)
    assert len(vlora_layers(made)) == 7
    torch.testing.assert_close(logits(made, tokenizer), logits(dense, tokenizer), rtol=1e-4, atol=1e-4)
    mean = load_base(section, tmp_path / "mean", torch.device("cpu"))
    assert len(vlora_layers(mean)) == 14
    torch.testing.assert_close(logits(mean, tokenizer), logits(dense, tokenizer), rtol=1e-4, atol=1e-4)
    both = torch.stack([layer.self_attn.q_proj.weight for layer in dense.model.layers])
    torch.testing.assert_close(mean.get_parameter("model.layers.0.self_attn.q_proj.compound_base.weight"), both.mean(0))
    assert main([*command, str(tmp_path / "four"), "--rank", "4"]) == 0
    truncated = load_base(section, tmp_path / "four", torch.device("cpu"))
    assert (logits(truncated, tokenizer) - logits(dense, tokenizer)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rank", "4", "--layers-per-compound", "3"], "layers_per_compound is 3, which does not divide 2 layers"),
        (["--rank", "999"], "more than full rank"),
        (["--rank", "x"], "--rank is 'x'; expected a whole number above 0."),
        (["--rank", "4", "--targets", "q_prj"], "No layer has a linear 'q_prj'"),
    ],
)
def test_from_dense_refuses(more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    command = ["vlora", "from-dense", "embedded:tiny-llama", "--layers-per-compound", "2", "--out", out, *more]
    assert main(command) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_from_dense_of_what_is_shared_already(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vlora", "from-dense", str(run / "model"), "--rank", "2", "--out", str(tmp_path / "out")]) == 2
    assert "is VLoRA already" in capsys.readouterr().err


def test_where_the_text_of_its_tokenizer_is_not(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained model brings the tokenizer, which cannot be trained anew there."""
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    file = moved / "recipe.yaml"
    file.write_text(file.read_text().replace(str(SHIPPED.parent), str(tmp_path / "absent")))
    assert merge(moved, tmp_path / "there") == 0 == merge(run, tmp_path / "here")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    capsys.readouterr()
    scores = []
    for folder in (run, moved):
        given = f"data.validation={SHIPPED.parent / 'test.txt'}"
        assert main(["evaluate", str(folder), "--split", "validation", given]) == 0
        scores.append(capsys.readouterr().out)
    assert scores[0] == scores[1]
