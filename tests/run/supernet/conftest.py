"""Supernets of the tiny LLaMA, trained in this process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from glora_llm.adapters.config import read_genome
from glora_llm.adapters.inject import adapted_layers
from glora_llm.cli import main
from glora_llm.evaluation.trained import load_adapted
from glora_llm.glora.path import LayerPath
from glora_llm.glora.supernet import set_paths
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from tests.in_process import alone, one_thread, train_in_process
from tests.merge.conftest import logits
from tests.run.test_train import write_rows

__all__ = ["alone", "one_thread"]
BUDGETS = {"3k": 3000, "1.5k": 1500, "0.7k": 700}
SEARCH = ["--budget", ",".join(BUDGETS), "search.passes=6"]
Copy = Callable[..., Path]


def overrides(data: Path, out: Path) -> list[str]:
    """A supernet on four linears, of 7,900 parameters, trained for three steps."""
    return [
        f"data.source={data}", "data.validation=8", "data.test=8", "data.max_rows=null", "data.max_test_rows=null",
        "training.steps=3", "training.warmup=0", "training.global_batch=8", "adapter.targets=[k_proj, down_proj]",
        "output.save_every=1", "output.keep=5", "merge.after_training=false", f"output.dir={out}",
    ]  # fmt: skip


def train(data: Path, out: Path, *more: str) -> int:
    """Train the supernet in this process."""
    return train_in_process("tiny_cpu_search", *overrides(data, out), *more)


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    """The run folder of a supernet that nobody has searched, and its rows beside it."""
    folder = tmp_path_factory.mktemp("supernet")
    assert train(write_rows(folder / "data.jsonl", 60), folder / "run", "search=null") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def searched(supernet: Path) -> Path:
    """The same with a genome for each of three limits."""
    run = supernet.with_name("searched")
    shutil.copytree(supernet, run)
    assert main(["search", str(run), *SEARCH]) == 0
    return run


@pytest.fixture
def copy_of(tmp_path: Path) -> Copy:
    """Return what copies a run folder into the test's own folder."""

    def copied(run: Path, name: str = "copy") -> Path:
        shutil.copytree(run, tmp_path / name)
        return tmp_path / name

    return copied


def supernet_logits(run: Path, genome: Path, adapter: Path | None = None) -> Tensor:
    """What a supernet computes on the paths of a genome: nothing is inherited or merged."""
    folder = RunFolder(run)
    model = load_adapted(make_plan(folder.recipe()), adapter or folder.adapter)
    layers, paths = adapted_layers(model), read_genome(genome)
    set_paths(layers, {name: paths.get(name, LayerPath(())) for name in layers})
    return logits(model)


def mark(file: Path) -> None:
    """Mark the first score of a journal: the mark is there as long as this line is kept."""
    lines = file.read_text().splitlines(keepends=True)
    lines[1] = json.dumps(json.loads(lines[1]) | {"mark": 1}) + "\n"
    file.write_text("".join(lines))


def unmark(file: Path) -> None:
    """Take the mark away again.

    Raises:
        KeyError: when it is gone.
    """
    lines = file.read_text().splitlines(keepends=True)
    entry = json.loads(lines[1])
    del entry["mark"]
    lines[1] = json.dumps(entry) + "\n"
    file.write_text("".join(lines))


def journal(run: Path) -> list[tuple[str, int]]:
    """Return what a journal holds scores of: (genome, row), one for each score."""
    entries = [json.loads(line) for line in (run / "search" / "journal.jsonl").read_text().splitlines()[1:]]
    return [(entry["code"], row) for entry in entries for row in entry["rows"]]
