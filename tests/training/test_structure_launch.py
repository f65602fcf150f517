"""Structures and the scales of slots are the same on one process and on two, under ZeRO 1 and ZeRO 3."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.training.launching import finished, launch, metrics
from tests.training.structure_worker import SCENARIOS

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Path]:
    """The run folders of every scenario, on one process (`1-zero1`) and on two."""
    found: dict[str, Path] = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = finished(launch("tests/training/structure_worker.py", str(out), ranks=ranks))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        found |= {f"{ranks}-{name}": out / name for name in SCENARIOS}
    return found


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


@pytest.mark.parametrize("name", ["1-zero3", "2-zero1", "2-zero3"])
def test_processes_and_stages_choose_alike(runs: dict[str, Path], name: str) -> None:
    one, other = runs["1-zero1"], runs[name]
    assert (one / "genome.json").read_text() == (other / "genome.json").read_text()
    expected, found = read(one, "structure/scores.json"), read(other, "structure/scores.json")
    assert expected.keys() == found.keys() and len(expected) == 14
    for layer, slots in expected.items():
        for slot, choices in slots.items():
            assert found[layer][slot] == pytest.approx(choices, rel=2e-3, abs=1e-2), (layer, slot)


@pytest.mark.parametrize("name", ["1-short-zero3", "2-short-zero1", "2-short-zero3"])
def test_short_runs_choose_alike(runs: dict[str, Path], name: str) -> None:
    one, other = runs["1-short-zero1"], runs[name]
    assert (one / "genome.json").read_text() == (other / "genome.json").read_text()
    expected, found = read(one, "structure/choice.json"), read(other, "structure/choice.json")
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5) and len(expected["losses"]) == 2
    assert found["score"] == pytest.approx(expected["score"], rel=2e-3)


@pytest.mark.parametrize("name", ["1-zero3", "2-zero1", "2-zero3"])
def test_scales_and_training_are_alike(runs: dict[str, Path], name: str) -> None:
    one, other = runs["1-zero1"], runs[name]
    expected, found = (read(run, "adapter/adapter_config.json")["scales"] for run in (one, other))
    assert expected == found and any(slots for slots in expected.values())
    assert metrics(other, "train/loss") == pytest.approx(metrics(one, "train/loss"), rel=2e-5)
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
