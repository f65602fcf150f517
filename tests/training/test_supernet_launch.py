"""Supernets on two gloo ranks: what is drawn, every ZeRO stage alike, and one search whoever runs it."""

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glora_llm import recipe
from glora_llm.adapters.inject import adapted_layers, inject
from glora_llm.cli import main
from glora_llm.glora.path import genome_to_slots
from glora_llm.glora.path_sampler import Supernet
from glora_llm.models.load import meta_model
from glora_llm.models.resolve import ResolvedModel
from tests.in_process import train_in_process
from tests.run.supernet.conftest import mark, unmark
from tests.run.test_train import write_rows
from tests.training.launching import ROOT, environment, finished, launch, metrics
from tests.training.supernet_worker import (
    BUDGETS,
    MICRO_BATCH,
    PARTITIONED,
    RESUMED,
    SEARCHED,
    SEARCHES,
    TAUGHT,
    TRAINED,
    searched_as,
    taught_as,
    trained_as,
)

pytestmark = pytest.mark.launch
BETA = 0.9  # Adam's, of the first moment
RESULTS = ("genome.json", "search/archive.json", *(f"search/genome-{text}.json" for text in BUDGETS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run folders of supernet_worker.py, made by two ranks of one thread each in one launch."""
    out = tmp_path_factory.mktemp("supernets")
    write_rows(out / "data.jsonl", 60)
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (out / f"{PARTITIONED}.json").write_text(json.dumps(config))
    done = finished(launch("tests/training/supernet_worker.py", str(out)), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


def drawn(run: Path, rank: int) -> list[Any]:
    """Return (step, number of the micro batch, paths of all layers), as the layers of one rank held them."""
    found: list[Any] = json.loads((run / f"draws-{rank}.json").read_text())
    return found


def adapter(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(run / "adapter" / "adapter_model.safetensors")
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_every_micro_batch_draws_paths_of_its_own(runs: Path, name: str) -> None:
    """Process p has the numbers p, p + 2, ... of each step."""
    micro_steps, seen = 1 if name.endswith("one") else 2, set()
    for rank in range(2):
        mine = drawn(runs / name, rank)
        assert [entry[:2] for entry in mine] == [[s, 2 * k + rank] for s in range(3) for k in range(micro_steps)]
        seen |= {json.dumps(entry[2]) for entry in mine}
    assert len(seen) == 3 * 2 * micro_steps


@pytest.mark.parametrize("micro_steps", MICRO_BATCH)
def test_draws_are_a_function_of_what_they_are_named_by(runs: Path, micro_steps: str, tiny: ResolvedModel) -> None:
    """Seed, step, number of the micro batch, and layer: whoever draws."""
    checked = recipe.load("tiny_cpu_search", [*trained_as(runs, f"zero0-{micro_steps}"), "output.dir=x"])
    model = inject(meta_model(checked.model, tiny.folder), checked.adapter, checked.training.seed, 3)
    supernet = Supernet(adapted_layers(model), checked.training.seed)
    for step, number, paths in (entry for rank in range(2) for entry in drawn(runs / f"zero0-{micro_steps}", rank)):
        supernet.draw(step, number)
        assert genome_to_slots({name: layer.path["default"] for name, layer in supernet.layers.items()}) == paths


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_supernet_is_the_uninterrupted_one(runs: Path, name: str) -> None:
    """Bit for bit, from the draws to the adapter."""
    whole, resumed = runs / name, runs / f"{name}-resumed"
    for rank in range(2):
        later = [entry for entry in drawn(whole, rank) if entry[0] >= 1]
        assert drawn(resumed, rank) == later and later
    for key in ("train/loss", "train/grad_norm", "validation/loss"):
        expected = {step: value for step, value in metrics(whole, key).items() if step > 1}
        assert metrics(resumed, key) == expected and expected
    files = [run / "adapter" / "adapter_model.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", [name for name in TRAINED if not name.startswith("zero0")])
def test_every_stage_trains_the_supernet_of_stage_zero(runs: Path, name: str) -> None:
    expected, got = runs / f"zero0-{name.partition('-')[2]}", runs / name
    for key in ("train/loss", "train/grad_norm", "validation/loss"):
        assert metrics(got, key) == pytest.approx(metrics(expected, key), rel=1e-5) and metrics(got, key), key
    weights = adapter(got)
    for key, weight in adapter(expected).items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-5, msg=key)
    assert sum(bool(weight.any()) for weight in weights.values()) > len(weights) / 2


def test_the_options_of_a_supernet_are_one_process_s_on_two_and_under_every_stage(runs: Path) -> None:
    """Sandwich, odds and the largest path as a teacher, which every process runs in every micro batch."""
    one = runs / "taught-one"
    assert train_in_process("tiny_cpu_search", *taught_as(runs, "zero0"), f"output.dir={one}") == 0
    for stage in TAUGHT:
        two = runs / f"taught-{stage}"
        for key in ("train/loss", "train/cross_entropy", "train/divergence", "train/grad_norm", "validation/loss"):
            assert metrics(two, key) == pytest.approx(metrics(one, key), rel=1e-5) and metrics(two, key), key
        for key, weight in adapter(one).items():
            torch.testing.assert_close(adapter(two)[key], weight, rtol=0, atol=1e-5, msg=key)
    paths = {4 * step + number: genome for rank in range(2) for step, number, genome in drawn(two, rank)}
    assert len(paths) == 12 and paths[0] == paths[3] == paths[6] != paths[1] == paths[4] == paths[7]
    assert len({json.dumps(paths[turn]) for turn in (2, 5, 8, 11)}) == 4


def computed(paths: list[dict[str, Any]], name: str) -> bool:
    """Tell whether a parameter is on one of the paths of a step."""
    layer, slot_and_part = name.removeprefix("base_model.model.").split(".slot_")
    slot, _, part = slot_and_part.replace(".default", "").partition(".")
    mode = {"down": "lora", "up": "lora"}.get(part, part)
    found = [path[layer].get(slot, "none") for path in paths]
    return mode in [given["mode"] if isinstance(given, dict) else given for given in found]


@pytest.mark.parametrize("training", TRAINED)
def test_what_is_not_drawn_has_a_gradient_of_zero(runs: Path, training: str) -> None:
    """Its first moment shrinks by beta and by nothing else: no gradient of an earlier step, or of one rank, is left."""
    run, before, seen = runs / training, dict[str, Tensor](), {True: 0, False: 0}
    for step in range(3):
        state = load_file(run / "checkpoints" / f"step-{step + 1}" / "state.safetensors")
        paths = [entry[2] for rank in range(2) for entry in drawn(run, rank) if entry[0] == step]
        for name in (key.removeprefix("exp_avg/") for key in state if key.startswith("exp_avg/")):
            moment, on_a_path = state[f"exp_avg/{name}"], computed(paths, name)
            left = BETA * before[name] if step else torch.zeros_like(moment)
            seen[on_a_path] += 1
            if not on_a_path:
                torch.testing.assert_close(moment, left, rtol=1e-6, atol=0, msg=f"{name}, step {step}")
            elif not name.endswith(".up"):  # while `down` is zero as it was, `up` has no gradient either
                assert not torch.equal(moment, left), f"{name}, step {step}"
            before[name] = moment
    assert min(seen.values()) > 10


def journal(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "search" / "journal.jsonl").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def one_process(runs: Path) -> Iterator[dict[str, Path]]:
    """Strategy -> the same supernet searched by `glora-llm search` in this process, with one thread."""
    found, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for strategy in ("additive", "evolution"):
        found[strategy] = runs / f"one-{strategy}"
        shutil.copytree(runs / SEARCHED, found[strategy])
        keys = [key for key in searched_as(runs, strategy, "zero1") if key.startswith("search.")]
        assert main(["search", str(found[strategy]), *keys]) == 0
    yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the launch computes on the CPU, this process does not")
def test_a_search_on_two_ranks_ends_like_one_in_one_process(
    runs: Path, one_process: dict[str, Path], name: str
) -> None:
    two, one = runs / f"search-{name}", one_process[name.partition("-")[0]]
    for file in RESULTS:
        assert (two / file).read_text() == (one / file).read_text(), file
    summaries = [json.loads((run / "summary.json").read_text())["search"] for run in (two, one)]
    for text, found in summaries[0].items():
        assert found["parameters"] <= float(text.rstrip("k")) * 1000
        assert found["candidates"] > 1 and found | {"seconds": 0} == summaries[1][text] | {"seconds": 0}
    scored = [(entry["code"], row) for entry in journal(two) for row in entry["rows"]]
    assert len(set(scored)) == len(scored)
    for entry, other in zip(journal(two), journal(one), strict=True):
        if name == "additive-zero3":  # gathers parameters to other addresses, where sums may be taken in another order
            assert entry.pop("slopes", []) == pytest.approx(other.pop("slopes", []), rel=1e-5, abs=1e-7)
        assert entry == other


def test_a_search_that_is_killed_goes_on_and_the_launch_ends_fine_tuned_and_merged(runs: Path, tmp_path: Path) -> None:
    """SIGKILL to the launcher and both ranks in the middle of the search, then the same command again."""
    whole, run = runs / "search-additive-zero3", tmp_path / "killed"
    shutil.copytree(runs / SEARCHED, run)
    more = ["search.finetune_steps=2", "merge.after_training=true", f"output.dir={run}"]
    settings = [*searched_as(runs, "additive", "zero3"), *more]
    settings.remove("merge.after_training=false")
    known = journal(whole)
    worker = ("tests/training/interrupted_worker.py", f"hangs_in_search={len(known) // 3}", "tiny_cpu_search")
    killed_after(launch(*worker, *settings), run / "search" / "journal.jsonl", len(known) // 3)
    assert len(journal_lines(run)) == len(known) // 3 and not (run / "genome.json").exists()
    mark(run / "search" / "journal.jsonl")
    done = finished(launch("train.py", "--recipe", "tiny_cpu_search", *settings), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    unmark(run / "search" / "journal.jsonl")
    for file in RESULTS:
        assert (run / file).read_text() == (whole / file).read_text(), file
    assert journal(run) == known, "scored again, or not at all"
    assert metrics(run / "finetuned", "train/loss").keys() == {1, 2}
    report = json.loads((run / "finetuned" / "merged" / "merge_report.json").read_text())
    assert report["max_abs_logit_diff"] < 1e-4


def journal_lines(run: Path) -> list[str]:
    """Return the scores in a journal whose last line may be cut off."""
    return (run / "search" / "journal.jsonl").read_text().split("\n")[1:-1]


def killed_after(command: list[str], file: Path, lines: int) -> None:
    """Start a launch, and kill it and all its ranks at once when a file has so many lines behind its first."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        limit, family = time.monotonic() + 900, list[psutil.Process]()
        while len(family) == 0 or file.read_bytes().count(b"\n") <= lines:
            assert process.poll() is None and time.monotonic() < limit, "the journal did not grow"
            if not family and file.is_file():
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            time.sleep(0.002)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
