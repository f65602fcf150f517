"""Merge, evaluate and export a supernet: its genome, with the weights that it inherits, as found or as edited."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from glora_llm.cli import main
from glora_llm.models.load import load_base
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from tests.merge.conftest import logits
from tests.run.supernet.conftest import Copy, supernet_logits
from tests.run.test_train import contents

LAYER = "model.layers.0.self_attn.k_proj"
LORA = {
    LAYER: {"A": {"mode": "lora", "rank": 2, "scale": 2.0}, "B": {"mode": "lora", "rank": 4, "scale": 2.0}},
    "model.layers.1.mlp.down_proj": {"B": {"mode": "lora", "rank": 2, "scale": 2.0}, "C": "vector", "E": "scalar"},
}
Write = Callable[[Any], Path]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """Return what writes a genome file."""

    def write(genome: Any) -> Path:
        (tmp_path / "mine.json").write_text(json.dumps(genome))
        return tmp_path / "mine.json"

    return write


def merged_logits(out: Path) -> Tensor:
    """What plain transformers makes of a merged folder."""
    return logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())


def merge(run: Path, out: Path, *more: object) -> int:
    return main(["merge", str(run), "--out", str(out), *map(str, more)])


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_merged_genome_answers_like_the_supernet_on_its_paths(searched: Path, tmp_path: Path) -> None:
    assert merge(searched, tmp_path / "out") == 0
    found = merged_logits(tmp_path / "out")
    assert_close(found, supernet_logits(searched, searched / "genome.json"))
    other = supernet_logits(searched, searched / "search" / "genome-0.7k.json")
    assert (found - other).abs().max() > 1e-3, "the genomes of this test differ too little"


def test_a_genome_edited_by_hand_is_what_is_merged(searched: Path, copy_of: Copy, tmp_path: Path) -> None:
    """With a rank between those of the supernet, a slot changed, and a layer taken away."""
    run = copy_of(searched)
    genome = json.loads((run / "genome.json").read_text())
    genome[LAYER] = {"B": {"mode": "lora", "rank": 3, "scale": 2.0}, "E": "vector"}
    del genome["model.layers.1.mlp.down_proj"]
    (run / "genome.json").write_text(json.dumps(genome))
    assert merge(run, tmp_path / "out") == 0
    found = merged_logits(tmp_path / "out")
    assert_close(found, supernet_logits(run, run / "genome.json"))
    assert (found - supernet_logits(run, searched / "genome.json")).abs().max() > 1e-3


def test_another_genome_file_leaves_the_run_as_it_is(searched: Path, copy_of: Copy, tmp_path: Path) -> None:
    run = copy_of(searched)
    before = contents(run)
    small = run / "search" / "genome-0.7k.json"
    assert merge(run, tmp_path / "out", "--genome", small) == 0
    assert_close(merged_logits(tmp_path / "out"), supernet_logits(run, small))
    after = contents(run)
    assert {name: text for name, text in after.items() if "adapter-genome-0.7k" not in name} == before


def test_the_run_s_own_merge_is_scored(searched: Path, copy_of: Copy) -> None:
    run = copy_of(searched)
    assert merge(run, run / "merged") == 0
    summary = RunFolder(run).summary()
    assert summary["test_merged"] == pytest.approx(summary["test_genome"], rel=1e-4)


def test_a_kept_checkpoint_of_the_supernet_is_merged(searched: Path, tmp_path: Path) -> None:
    assert merge(searched, tmp_path / "out", "--step", 1) == 0
    found = merged_logits(tmp_path / "out")
    early = searched / "checkpoints" / "step-1" / "adapter"
    assert_close(found, supernet_logits(searched, searched / "genome.json", early))
    assert (found - supernet_logits(searched, searched / "genome.json")).abs().max() > 1e-3


def test_evaluate_scores_the_genome(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = RunFolder(searched).summary()

    def printed(*more: str) -> dict[str, float]:
        assert main(["evaluate", str(searched), *more]) == 0
        return {name: float(value) for name, value in map(str.split, capsys.readouterr().out.splitlines())}

    assert printed() == pytest.approx(summary["test_genome"], abs=6e-5)
    assert printed("--split", "validation")["validation/loss"] == pytest.approx(
        -summary["search"]["3k"]["score"], abs=6e-5
    )
    small = printed("--split", "validation", "--genome", str(searched / "search" / "genome-0.7k.json"))
    assert small["validation/loss"] == pytest.approx(-summary["search"]["0.7k"]["score"], abs=6e-5)


def test_others_may_read_what_was_written(searched: Path, tmp_path: Path) -> None:
    """Every file of a run, of its search and of a merge has the mode that the umask gives."""
    assert merge(searched, tmp_path / "out") == 0 and merge(searched, tmp_path / "gguf", "--for", "llama.cpp") == 0
    umask = os.umask(0)
    os.umask(umask)
    files = [file for folder in (searched, tmp_path) for file in folder.rglob("*") if file.is_file()]
    assert len([file for file in files if file.suffix == ".safetensors"]) > 4
    assert [file for file in files if file.stat().st_mode & 0o777 != 0o666 & ~umask] == []


def test_a_genome_of_low_rank_slots_is_a_plain_lora(searched: Path, written: Write, tmp_path: Path) -> None:
    file, plan = written(LORA), make_plan(RunFolder(searched).recipe())
    assert merge(searched, tmp_path / "out", "--to", "lora", "--genome", file) == 0
    base = load_base(plan.recipe.model, plan.base.folder, torch.device("cpu"))
    found = logits(PeftModel.from_pretrained(base, str(tmp_path / "out")).eval())
    assert_close(found, supernet_logits(searched, file))
    assert (found - supernet_logits(searched, written({LAYER: LORA[LAYER]}))).abs().max() > 1e-3


def test_a_genome_without_a_lora_form_is_refused(
    searched: Path, written: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written({**LORA, LAYER: {"A": "vector"}})
    assert merge(searched, tmp_path / "out", "--to", "lora", "--genome", file) == 2
    said = capsys.readouterr().err
    assert "1 layers have no plain LoRA form (A other than lora, or a hadamard A, scales W0" in said and LAYER in said
    assert "Merge them instead" in said and not (tmp_path / "out").exists()
    assert merge(searched, tmp_path / "out", "--genome", file) == 0
