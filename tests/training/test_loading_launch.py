"""Four gloo processes load and train a LLaMA of about 1 GB under ZeRO 3; each loads within half of the model's size."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from glora_llm.models.random_llama import TINY, write_random_llama
from tests.training.launching import ROOT, finished, launch, metrics

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.reliability]
SHAPE = replace(TINY, layers=38, hidden=768, intermediate=2048, heads=12, kv_heads=6, std=0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("model")
    write_random_llama(folder, SHAPE, seed=0, shard_bytes=3 * 10**8)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runs(model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of what four processes trained under ZeRO 3, and of what one trained with the whole model."""
    folder = tmp_path_factory.mktemp("loaded")
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"] |= {
        "stage3_max_live_parameters": 2_000_000,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 1_000_000,
        "reduce_bucket_size": 1_000_000,  # its buffer is made with the engine, whatever the size of the model
        "stage3_param_persistence_threshold": 10_000,
    }
    divided = folder / "divided.json"
    divided.write_text(json.dumps(config))
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} ", "completion": f"{n + 1}"}) + "\n" for n in range(16)))
    for processes, deepspeed, out in ((4, str(divided), folder / "four"), (1, "zero1", folder / "one")):
        arguments = [str(model), deepspeed, str(data), str(out)]
        command = launch("tests/training/loading_worker.py", *arguments, ranks=processes)
        # What is freed goes back to the system at once, so that a peak is what was needed.
        done = finished(command, timeout=1500, MALLOC_MMAP_THRESHOLD_="65536")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder / "four", folder / "one"


def gigabytes(model: Path) -> float:
    files = list(model.glob("*.safetensors"))
    assert len(files) > 3
    return sum(file.stat().st_size for file in files) / 1e9


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_no_process_holds_half_of_the_model(runs: tuple[Path, Path], model: Path, quantization: str) -> None:
    four, one = (json.loads((out / "peaks.json").read_text()) for out in runs)
    size = gigabytes(model)
    assert len(four) == 4 and 0.95 < size < 1.05
    for process in four:
        loading, training = process[quantization]
        assert 0 < loading < 0.5 * size
        assert training < 0.6 * size  # its part, the layers that are gathered, activations
    if quantization == "none":  # whole on one process, read from mapped files as it is first used
        assert one[0]["none"][1] > 0.95 * size, "the measurement itself would see a whole model"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_losses_are_those_of_a_whole_model(runs: tuple[Path, Path], quantization: str) -> None:
    for key in ("train/loss", "train/grad_norm", "validation/loss"):
        divided, whole = (metrics(out / quantization, key) for out in runs)
        assert divided == pytest.approx(whole, rel=2e-5) and whole, key


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_is_held_is_said(runs: tuple[Path, Path], model: Path, quantization: str) -> None:
    four, one = (json.loads((out / quantization / "summary.json").read_text()) for out in runs)
    assert four["bytes_per_rank"] < 0.3 * one["bytes_per_rank"]
    assert 0 < four["load_peak_gb"] < max(one["load_peak_gb"], one["peak_memory_gb"])
