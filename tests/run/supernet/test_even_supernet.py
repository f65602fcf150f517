"""A supernet in even scaling with every option of its draws: one run, searched, deployed, trained on, resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glora_llm.adapters.config import read_genome
from glora_llm.adapters.even import even_scales, set_scales
from glora_llm.adapters.inject import adapted_layers, inject
from glora_llm.adapters.weights import load_start, trainables
from glora_llm.cli import main
from glora_llm.evaluation.scoring import score_model
from glora_llm.evaluation.trained import load_adapted
from glora_llm.models.load import load_base
from glora_llm.models.resolve import resolve
from glora_llm.plan.genome import deployed
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from tests.merge.conftest import logits
from tests.run.supernet.conftest import supernet_logits, train
from tests.run.supernet.test_deployed import assert_close, merge, merged_logits
from tests.run.test_train import write_rows

OPTIONS = [
    "adapter.scaling=even", "training.lr=auto", "model.quantization=nf4",
    "adapter.supernet={ranks: [4, 2, 1], sandwich: 3, odds: {B: {lora: 3}}, distill: 0.5}",
    "search.passes=3", "search.budget=[3k, 1k]", "search.finetune_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    folder = tmp_path_factory.mktemp("even")
    assert train(write_rows(folder / "data.jsonl", 60), folder / "run", *OPTIONS) == 0
    return folder / "run"


def config(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return found


def test_every_mode_has_a_factor_and_every_rank_a_scale(run: Path) -> None:
    saved, recipe = config(run / "adapter"), RunFolder(run).recipe()
    base = load_base(recipe.model, resolve(recipe.model).folder, torch.device("cpu"))
    model = inject(base, recipe.adapter, 0, 1)
    assert saved["scaling"] == "even" and saved["scales"] == even_scales(model)
    for name, layer in adapted_layers(model).items():
        factors = saved["scales"][name]
        assert {slot: set(modes) for slot, modes in factors.items()} == {
            "A": {"lora", "vector", "scalar"}, "B": {"lora", "vector", "scalar"}, "C": {"lora", "vector"},
            "E": {"vector", "scalar"},
        }  # fmt: skip
        assert [spec.scale for spec in layer.choices["default"]["B"] if spec.mode == "lora"] == [2.0, 4.0, 8.0]
    assert len({factors["A"]["lora"] for factors in saved["scales"].values()}) == 4, "a factor of each layer's weight"


def test_a_genome_keeps_its_factors_and_scores_as_the_search_said(run: Path) -> None:
    summary, genome = RunFolder(run).summary(), json.loads((run / "genome.json").read_text())
    recipe, adapter = deployed(RunFolder(run), run / "adapter")
    assert config(adapter)["scales"] == config(run / "adapter")["scales"]
    ranked = [spec for slots in genome.values() for spec in slots.values() if isinstance(spec, dict)]
    assert ranked and all(spec["scale"] * spec["rank"] == 8.0 for spec in ranked)
    plan = make_plan(recipe)
    scores = score_model(plan, load_adapted(plan, adapter), "validation")
    assert scores["validation/loss"] == pytest.approx(-summary["search"]["3k"]["score"], rel=1e-6)
    start = make_plan(RunFolder(run / "finetuned").recipe())
    assert start.recipe.training.lr == RunFolder(run).recipe().training.lr


def test_a_genome_is_trained_on_as_an_adapter_of_its_own_slots(run: Path) -> None:
    """They share the step that four slots shared in the supernet, and begin as what they inherit."""
    plan = make_plan(RunFolder(run / "finetuned").recipe())
    section, genome = plan.recipe.adapter, read_genome(run / "genome.json")
    assert section.weights == str(run / "search" / "adapter")
    base = load_base(plan.recipe.model, resolve(plan.recipe.model).folder, torch.device("cpu"))
    model = inject(base, section, 0, 1, genome)
    set_scales(model, even_scales(model))
    assert config(run / "finetuned" / "adapter")["scales"] == model.peft_config["default"].scales
    inherited, changed = config(run / "search" / "adapter")["scales"], 0
    for name, path in genome.items():
        slots = [slot for slot, _ in path.active()]
        changed += len(slots) < 4
        for slot, spec in path.active():
            factor = adapted_layers(model)[name].factor("default", slot, spec.mode)
            assert factor == pytest.approx(inherited[name][slot][spec.mode] * 4 / len(slots), rel=1e-5)
    assert changed, "every layer has every slot"
    load_start(model, trainables(model, section, 1.0), Path(section.weights))
    expected = logits(load_adapted(plan, run / "search" / "adapter"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_each_size_is_scored_and_deployed_by_its_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one of several limits, with the test scores of each beside the others."""
    found, lines = RunFolder(run).summary(), (run / "search" / "limits.md").read_text().splitlines()
    assert found["test_genome"] == found["search"]["3k"]["test"] != found["search"]["1k"]["test"]
    assert lines[0].startswith("| limit | parameters | validation score (loss) | test/loss |") and len(lines) == 4
    for line, limit in zip(lines[2:], ("3k", "1k"), strict=True):
        loss = found["search"][limit]["test"]["test/loss"]
        assert line.startswith(f"| {limit} | {found['search'][limit]['parameters']:,} | ") and f"{loss:.4f}" in line
    file = run / "search" / "genome-1k.json"
    assert main(["evaluate", str(run), "--genome", str(file)]) == 0
    assert f"{found['search']['1k']['test']['test/loss']:.4f}" in capsys.readouterr().out
    assert merge(run, tmp_path / "out", "--genome", file, "--dtype", "float32") == 0
    assert_close(merged_logits(tmp_path / "out"), supernet_logits(run, file))


def test_a_resumed_run_is_the_uninterrupted_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, also where a newer release has other constants."""
    again = tmp_path / "run"
    (again / "checkpoints").mkdir(parents=True)
    for name in ("recipe.yaml", "base.json", "learning_rate.json"):
        shutil.copy(run / name, again / name)
    shutil.copytree(run / "checkpoints" / "step-1", again / "checkpoints" / "step-1")
    monkeypatch.setattr("glora_llm.adapters.even.CONSTANTS", {("A", "lora"): 5.0})
    assert train(run.with_name("data.jsonl"), again, *OPTIONS, "search=null") == 0
    whole, resumed = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, again))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert config(again / "adapter")["scales"] == config(run / "adapter")["scales"]


def test_a_supernet_begins_with_a_trained_lora(run: Path, tmp_path: Path) -> None:
    """At a rate of almost nothing its largest path stays that LoRA; its other factors are measured, as always."""
    data, lora = run.with_name("data.jsonl"), tmp_path / "lora"
    fixed = ["adapter={method: lora, targets: [k_proj, down_proj], rank: 4, alpha: 6}", "search=null"]
    assert train(data, lora, *fixed, "training.steps=1", "training.lr=1e-2") == 0
    start = ["adapter.scaling=even", f"adapter.weights={lora / 'adapter'}", "training.lr=1e-12", "training.steps=1"]
    assert train(data, tmp_path / "run", *start, "search=null") == 0
    losses = [RunFolder(folder).summary()["test"]["test/loss"] for folder in (lora, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert set(config(tmp_path / "run" / "adapter")["scales"]["model.layers.0.mlp.down_proj"]) == set("ABCE")
