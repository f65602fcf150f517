"""NOAH as whole runs on a tiny ViT: a supernet, a search under a limit, the structure trained further and anew."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification

from glora_llm import recipe as recipes
from glora_llm.adapters.config import read_genome
from glora_llm.cli import main
from glora_llm.errors import UserError
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.search_checks import check_search
from glora_llm.report.page_run import method_in_words
from glora_llm.report.run_record import read_run
from tests.in_process import alone, one_thread, train_in_process

__all__ = ["alone", "one_thread"]
HEAD = 6 * 32 + 6  # weights and biases of the new head: they are trained in full, and in no limit
LARGEST = 2 * (422 + 512 + 160)  # two blocks of width 32: adapter 6, LoRA 4 on two linears, 5 prompts
LIMIT = 1500
SHORT = [
    "data.source=embedded:shapes", "data.test=test", "data.shots=null", "data.shots_seed=null",
    "data.max_rows=64", "data.max_test_rows=16",
    "data.validation=16", "data.images={flip: true}", "training.epochs=null", "training.steps=4", "training.warmup=0",
    "training.global_batch=16", "training.micro_batch=8", "output.save_every=2", "evaluation.test_before=true",
]  # fmt: skip
SEARCHED = [
    "adapter.supernet={sizes: {adapter: [6, 3, 0], lora: [4, 2, 0], prompt: [5, 0]}}", f"search.budget={LIMIT}",
    "search.population=6", "search.parents=2", "search.generations=1", "search.finetune_steps=2",
    "search.retrain_steps=2", "search.retrain_lr=2e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    """The folder of a random ViT."""
    folder = tmp_path_factory.mktemp("vit") / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=7)).save_pretrained(folder)
    return folder


def train(vit: Path, out: Path, *more: str) -> int:
    base = [f"model.name_or_path={vit}", "model.dtype=float32", *SHORT]
    return train_in_process("vit_fewshot_noah", *base, *more, f"output.dir={out}")


@pytest.fixture(scope="module")
def run(vit: Path) -> Path:
    """A supernet that was searched under a limit, and its best structure trained further and anew."""
    out = vit.with_name("run")
    assert train(vit, out, *SEARCHED) == 0
    return out


def test_the_structure_is_within_the_limit_and_scored_three_times(run: Path) -> None:
    """With inherited weights, after further steps, and trained anew: all in the run's summary.json."""
    summary, found = RunFolder(run).summary(), json.loads((run / "summary.json").read_text())["search"][str(LIMIT)]
    assert 0 < found["parameters"] == found["cost"] <= LIMIT and found["candidates"] > 6
    genome = json.loads((run / "genome.json").read_text())
    assert set(genome) == {"vit.layers.0", "vit.layers.1"} and {s for sizes in genome.values() for s in sizes}
    assert all(type(size) is int for sizes in genome.values() for size in sizes.values())
    archive = json.loads((run / "search" / "archive.json").read_text())["candidates"]
    assert max(candidate["parameters"] for candidate in archive) <= LIMIT
    assert all((run / "search" / f"{name}.png").is_file() for name in ("pareto", "generations", "modes", "sizes"))
    further, anew = (RunFolder(run / name) for name in ("finetuned", "retrained"))
    assert summary["trained_parameters"] == LARGEST + HEAD
    for name, folder in (("finetuned", further), ("retrained", anew)):
        assert summary[f"test_{name}"] == folder.summary()["test"]
        assert folder.summary()["trained_parameters"] - HEAD == found["parameters"]
        assert read_genome(folder.genome) == read_genome(run / "genome.json")
    assert further.summary()["test_before"] == pytest.approx(summary["test_genome"], rel=1e-5)
    assert (further.recipe().training.lr, anew.recipe().training.lr) == (5e-4, 2e-3)
    assert further.recipe().adapter.weights and anew.recipe().adapter.weights is None
    assert anew.summary()["test_before"] != pytest.approx(summary["test_genome"], rel=1e-5)


def test_a_resumed_run_ends_with_the_same_bytes(run: Path, vit: Path, tmp_path: Path) -> None:
    halves = tmp_path / "halves"
    train(vit, halves, *SEARCHED, "output.stop_after=2")
    assert not (halves / "adapter").exists()
    assert train(vit, halves, *SEARCHED) == 0
    assert (halves / "genome.json").read_text() == (run / "genome.json").read_text()
    for place in ("adapter", "retrained/adapter"):
        whole, resumed = (load_file(folder / place / "adapter_model.safetensors") for folder in (run, halves))
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_evaluate_and_search_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = RunFolder(run).summary()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--split", "validation"]) == 0
    said = dict(map(str.split, capsys.readouterr().out.splitlines()))
    assert float(said["validation/accuracy"]) == pytest.approx(summary["search"][str(LIMIT)]["score"], abs=6e-5)
    assert main(["search", str(run), "--budget", "300", "search.strategy=random", "search.passes=4"]) == 0
    assert RunFolder(run).summary()["search"]["300"]["parameters"] <= 300
    assert main(["search", str(run), "search.strategy=additive"]) == 2
    assert "takes the first-order importance of every choice" in capsys.readouterr().err
    assert method_in_words(read_run(run)) == "a NOAH supernet"


def test_a_merge_is_of_lora_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed, lora, none = (tmp_path / f"{name}.json" for name in ("mixed", "lora", "none"))
    mixed.write_text('{"vit.layers.0": {"lora": 2}, "vit.layers.1": {"adapter": 3}}')
    lora.write_text('{"vit.layers.0": {"lora": 2}, "vit.layers.1": {"lora": 4}}')
    none.write_text('{"vit.layers.0": {"lora": 0}}')
    assert main(["merge", str(run), "--out", str(tmp_path / "out"), "--genome", str(mixed)]) == 2
    said = capsys.readouterr().err
    assert "its adapters and prompts are modules and tokens of their own" in said and "LoRA alone merges" in said
    assert main(["merge", str(run), "--out", str(tmp_path / "out"), "--genome", str(none)]) == 2
    assert "every slot of every layer is none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["merge", str(run), "--out", str(tmp_path / "out"), "--genome", str(lora)]) == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["max_abs_logit_diff"] < 1e-4


def test_fixed_sizes_train_and_the_overview_says_what_merges(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["adapter.paths=null", "adapter.supernet=null", "search=null", "adapter.rank=2"]
    assert train(vit, tmp_path / "run", *fixed, "merge.after_training=true") == 2
    assert "merge.after_training: An adapter of method noah cannot be merged" in capsys.readouterr().err
    lora = "adapter.peft={adapter: 0, prompt: 0}"
    assert train(vit, tmp_path / "run", *fixed, lora, "merge.after_training=true") == 0
    assert "merge      possible" in capsys.readouterr().out and (tmp_path / "run" / "merged").is_dir()
    plan = make_plan(RunFolder(tmp_path / "run").recipe())
    assert plan.recipe.adapter.method == "noah"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["search.strategy=additive"], "set search.strategy=evolution (NOAH's own) or random"),
        (["search.limit=seconds"], "search.limit seconds is measured of linears with GLoRA's slots alone"),
        (["search.limit=megabytes"], "set search.limit=parameters"),
        (["data.validation=null"], "never on test rows: set data.validation"),
    ],
)
def test_a_search_that_noah_has_no_measure_for(more: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_search(recipes.load("vit_fewshot_noah", more))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("adapter.supernet={ranks: [2]}", "supernet.ranks is not of method noah, whose supernet has sizes"),
        ("adapter.method=glora", "supernet.sizes is not of method glora, whose supernet has modes and ranks"),
        ("adapter.method=lora", "paths belongs to method glora, not to 'lora'"),
        ("adapter.supernet={sizes: {lora: [2, 2]}}", "lora names a size twice: [2, 2]"),
        ("adapter.supernet={sizes: {lra: [2]}}", "Did you mean 'lora'?"),
        ("adapter.supernet={sizes: {prompt: [-1]}}", "got -1 (integer), expected greater than or equal to 0"),
    ],
)
def test_sizes_that_are_none(more: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.load("vit_fewshot_noah", [more])
    assert said in str(caught.value)
