"""`glora-llm search RUN`: a genome for each limit, chosen on validation rows alone, and nothing scored twice."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glora_llm import recipe as recipes
from glora_llm.adapters.config import read_genome
from glora_llm.adapters.inject import adapted_layers
from glora_llm.cli import main
from glora_llm.data.store import TokenSet
from glora_llm.evaluation.scoring import passes_of, score_model
from glora_llm.evaluation.trained import load_adapted
from glora_llm.glora.path import genome_to_slots
from glora_llm.glora.path_sampler import Supernet
from glora_llm.plan.genome import extract
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.search import Launch, run_search
from tests.run.supernet.conftest import BUDGETS, SEARCH, Copy, journal, mark, train, unmark
from tests.run.test_train import contents

ALONE = Launch(True, lambda value: value, torch.device("cpu"))


def test_three_limits_give_three_genomes_within_them(searched: Path, tmp_path: Path) -> None:
    """Their parameters are counted in the weights that they inherit."""
    found = RunFolder(searched).summary()["search"]
    assert list(found) == list(BUDGETS)
    sizes = []
    for text, limit in BUDGETS.items():
        extract(searched / "adapter", searched / "search" / f"genome-{text}.json", tmp_path / text)
        weights = load_file(tmp_path / text / "adapter_model.safetensors")
        sizes.append(sum(weight.numel() for weight in weights.values()))
        assert sizes[-1] == found[text]["parameters"] == found[text]["cost"] <= limit
        assert found[text]["candidates"] > 1
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert (searched / "genome.json").read_text() == (searched / "search" / "genome-3k.json").read_text()


def test_a_search_leaves_an_archive_and_pictures(searched: Path) -> None:
    names = {path.name for path in (searched / "search").iterdir()}
    assert names >= {f"{name}.png" for name in ("pareto", "generations", "modes", "sizes")}
    archive = json.loads((searched / "search" / "archive.json").read_text())
    assert (archive["metric"], archive["limit"]) == ("loss", "parameters")
    entries = archive["candidates"]
    front = [entry for entry in entries if entry["pareto"]]
    assert len(entries) > len(front) > 1 and all("genome" in entry for entry in front)
    for entry in entries:
        beaten = [
            other for other in entries
            if other["score"] >= entry["score"] and other["parameters"] <= entry["parameters"]
            and (other["score"], other["parameters"]) != (entry["score"], entry["parameters"])
        ]  # fmt: skip
        assert not (entry["pareto"] and beaten)
    chosen = json.loads((searched / "genome.json").read_text())
    assert chosen in [entry["genome"] for entry in front]


def test_the_score_of_a_search_is_what_the_genome_s_own_adapter_has(searched: Path, tmp_path: Path) -> None:
    """Minus the validation loss; and the test rows were scored once, on that genome."""
    plan = make_plan(RunFolder(searched).recipe())
    extract(searched / "adapter", searched / "genome.json", tmp_path / "adapter")
    model, summary = load_adapted(plan, tmp_path / "adapter"), RunFolder(searched).summary()
    validation = score_model(plan, model, "validation")
    assert validation["validation/loss"] == pytest.approx(-summary["search"]["3k"]["score"], rel=1e-6)
    assert score_model(plan, model, "test") == pytest.approx(summary["test_genome"], rel=1e-6)
    assert summary["test_genome"]["test/loss"] != summary["test"]["test/loss"]


@pytest.mark.parametrize("share", [0.05, 0.15, 0.35, 0.8])
def test_a_search_cut_off_anywhere_goes_on(searched: Path, copy_of: Copy, share: float) -> None:
    """In the middle of a line too: the same genomes, and what was scored is not scored again."""
    run, known = copy_of(searched), journal(searched)
    file = run / "search" / "journal.jsonl"
    whole = file.read_bytes()
    cut = whole[: int(share * len(whole))]
    file.write_bytes(cut)
    kept = cut.count(b"\n") > 1  # a whole entry, after the line that says what is searched
    assert kept == (share > 0.05)
    if kept:
        mark(file)
    (run / "genome.json").unlink()
    assert main(["search", str(run), *SEARCH]) == 0
    if kept:
        unmark(file)
    assert journal(run) == known and len(set(known)) == len(known)
    assert file.read_bytes() == whole
    for name in ("genome.json", "search/archive.json", *(f"search/genome-{text}.json" for text in BUDGETS)):
        assert (run / name).read_bytes() == (searched / name).read_bytes(), name


def test_test_rows_are_sealed_while_a_genome_is_chosen(supernet: Path, copy_of: Copy) -> None:
    folder = RunFolder(copy_of(supernet))
    plan = make_plan(recipes.load(str(folder.path / "recipe.yaml"), ["search.passes=2"]))
    model, test = load_adapted(plan, folder.adapter), plan.task.test
    assert isinstance(test, TokenSet)
    passes, peeks = passes_of(plan, model), 0

    def peeking(batch: dict[str, torch.Tensor]) -> object:
        nonlocal peeks
        peeks += 1
        if peeks == 3:
            test.row(0)
        return passes.score(batch)

    with pytest.raises(RuntimeError, match="the test rows were read while a search was choosing a genome"):
        run_search(plan, folder, model, passes._replace(score=peeking), lambda table: table, ALONE)
    assert peeks == 3 and not folder.genome.exists()
    assert len(test.row(0).tokens) > 0, "open again"


def test_costs_are_measured_once(supernet: Path, copy_of: Copy) -> None:
    """Seconds and megabytes together, in RUN/search/costs.json; a genome costs the sum of its slots."""
    run = copy_of(supernet)
    costs = run / "search" / "costs.json"
    assert main(["search", str(run), "search.passes=2", "search.limit=seconds"]) == 0
    measured, written = costs.read_bytes(), costs.stat().st_mtime_ns
    assert main(["search", str(run), "search.limit=megabytes", "--budget", "0.5,0.1", "search.passes=2"]) == 0
    assert (costs.read_bytes(), costs.stat().st_mtime_ns) == (measured, written)
    found, table = RunFolder(run).summary()["search"], json.loads(measured)
    layers = adapted_layers(load_adapted(make_plan(RunFolder(run).recipe()), run / "adapter"))
    for text in ("0.5", "0.1"):
        keys = [
            f"{layers[name].out_features}x{layers[name].in_features} no bias {slot} {spec.mode} {spec.rank}"
            for name, path in read_genome(run / "search" / f"genome-{text}.json").items()
            for slot, spec in path.active()
        ]
        megabytes = sum(table[key]["megabytes"] for key in keys)
        assert found[text]["cost"] == pytest.approx(megabytes) and 0 < megabytes <= float(text)
    assert all(values["seconds"] >= 0 for values in table.values())


def test_training_again_neither_trains_nor_searches_again(
    searched: Path, copy_of: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(searched)
    before = {name: text for name, text in contents(run).items() if "tensorboard" not in name}
    assert train(searched.with_name("data.jsonl"), run, "search.passes=3") == 0
    said = capsys.readouterr().out
    assert "training had ended already, after step 3" in said and "the search had ended already: " in said
    after = {name: text for name, text in contents(run).items() if "tensorboard" not in name}
    assert {name for name in before if before[name] != after[name]} <= {
        "recipe.yaml",
        "launches.jsonl",
    } and before.keys() == after.keys()


def test_one_process_resumed_draws_and_ends_as_if_uninterrupted(
    supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draws are noted as the layers hold them in each micro step: 4 rows of 8 are one."""
    noted: list[tuple[int, int, object]] = []
    draw = Supernet.draw

    def note(self: Supernet, step: int, micro_step: int) -> None:
        draw(self, step, micro_step)
        paths = {name: layer.path["default"] for name, layer in self.layers.items()}
        noted.append((step, micro_step, genome_to_slots(paths)))

    monkeypatch.setattr(Supernet, "draw", note)
    data = supernet.with_name("data.jsonl")
    assert train(data, tmp_path / "whole", "search=null") == 0
    whole = list(noted)
    assert [entry[:2] for entry in whole] == [(step, micro) for step in range(3) for micro in range(2)]
    assert all(one[2] != other[2] for one, other in itertools.combinations(whole, 2))
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-1", tmp_path / "again" / "checkpoints" / "step-1")
    shutil.copy(tmp_path / "whole" / "recipe.yaml", tmp_path / "again" / "recipe.yaml")
    noted.clear()
    assert train(data, tmp_path / "again", "search=null") == 0
    assert noted == whole[2:]
    weights = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("whole", "again")]
    assert weights[0] == weights[1]
    assert weights[0] == (supernet / "adapter" / "adapter_model.safetensors").read_bytes()
