"""What a report says of a run's structure, against adapters whose names and shapes are written here."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from glora_llm.report.run_record import read_run
from glora_llm.report.structure import Cell, Structure, read_structure
from glora_llm.report.structure_svg import modes, structure_svg, summary_rows
from tests.report.made_runs import KINDS, LAYERS, write_run

LINEAR = "model.layers.1.mlp.up_proj"


def structure_of(run: Path) -> Structure:
    found = read_structure(read_run(run))
    assert found is not None
    return found


def write_tensors(run: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {f"base_model.model.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, run / "adapter" / "adapter_model.safetensors")


def test_an_adapter_says_its_modes_and_ranks(tmp_path: Path) -> None:
    found = structure_of(write_run(tmp_path / "run"))
    alike = {"A": Cell("lora", 4), "B": Cell("lora", 4), "C": Cell("vector"), "E": Cell("vector")}
    assert found.cells == {f"model.layers.{layer}.{kind}": alike for layer in range(LAYERS) for kind in KINDS}
    linears = LAYERS * len(KINDS)
    assert found.by_slot == {"A": linears * 64, "B": linears * 56, "C": linears * 8, "E": linears * 6}
    assert found.total == sum(found.by_layer.values()) == linears * 134 and list(found.by_layer) == ["0", "1", "2"]
    assert summary_rows(found)[0] == ["q_proj", "3", "lora, rank 4", "lora, rank 4", "vector", "vector"]


def test_a_genome_is_counted_in_the_shapes_of_its_supernet(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", recipe="tiny_cpu_search")
    stem = f"{LINEAR}.slot_"
    write_tensors(
        run,
        {
            f"{stem}A.down": (10, 4), f"{stem}A.up": (4, 6), f"{stem}A.vector": (12,), f"{stem}A.scalar": (1,),
            f"{stem}B.down": (12, 4), f"{stem}B.up": (4, 10), f"{stem}E.vector": (12,),
        },
    )  # fmt: skip
    genome = {LINEAR: {"A": {"mode": "lora", "rank": 2, "scale": 1.0}, "B": "none", "E": "vector"}}
    (run / "genome.json").write_text(json.dumps(genome))
    found = structure_of(run)
    assert found.cells == {LINEAR: {"A": Cell("lora", 2), "E": Cell("vector")}} and found.source == "genome.json"
    assert found.by_slot == {"A": 2 * (10 + 6), "E": 12}


def test_a_peft_method_has_one_slot(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "adapter.method=lora", "adapter.slots=null")
    write_tensors(run, {f"{LINEAR}.lora_A.weight": (8, 16), f"{LINEAR}.lora_B.weight": (32, 8)})
    found = structure_of(run)
    assert found.cells == {LINEAR: {"lora": Cell("lora", 8)}} and found.by_slot == {"lora_A": 128, "lora_B": 256}


def test_of_a_run_that_has_not_ended_it_is_the_newest_checkpoints(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for step in (9, 10):
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (run / "adapter").rename(run / "checkpoints" / "step-10" / "adapter")
    assert structure_of(run).source == "checkpoints/step-10/adapter/adapter_model.safetensors"


def test_the_picture_joins_neighbours_that_are_alike(tmp_path: Path) -> None:
    found = structure_of(write_run(tmp_path / "run"))
    found.cells["model.layers.1.mlp.up_proj"] = {"A": Cell("lora", 8)}
    text = str(structure_svg(found, "name"))
    assert text.count("<rect") == 4 + 4 * 3, "q_proj is alike in all layers, up_proj differs in the middle one"
    assert "up_proj, A, layer 1: lora, rank 8" in text and "q_proj, A, layer 0 to 2: lora, rank 4" in text
    assert [words for _, _, words in modes(found)] == ["lora, rank 4", "lora, rank 8", "vector", "none"]
