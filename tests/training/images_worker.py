"""Trains image classifiers in one launch, as worker.py does language models.

deepspeed --num_gpus 2 tests/training/images_worker.py OUT
"""

import shutil
import sys
from pathlib import Path

from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from tests.training.scenarios import train_scenario

COMMON = [
    "training.steps=6", "training.warmup=0", "training.global_batch=32", "training.micro_batch=8", "data.max_rows=300",
    "data.max_test_rows=64", "data.validation=32", "model.config.num_hidden_layers=4", "vlora.layers_per_compound=2",
    "vlora.start=kaiming", "evaluation.every=3", "output.save_every=3", "output.keep=5", "merge.after_training=false",
]  # fmt: skip
VARIED = "data.images={crop_padding: 2, flip: true, randaugment: 2, mixup: 0.4, cutmix: 0.4, label_smoothing: 0.1}"
SCENARIOS: dict[str, list[str]] = {
    "zero0": ["training.deepspeed=zero0", "data.images=null"],
    "zero1": ["training.deepspeed=zero1", "data.images=null"],
    "zero2": ["training.deepspeed=zero2", "data.images=null"],
    "zero3": ["training.deepspeed=zero3", "data.images=null"],
    "varied": ["training.deepspeed=zero2", VARIED],
    "bfloat16": ["training.deepspeed=zero2", "model.dtype=bfloat16", VARIED],
    "zero3_bfloat16": ["training.deepspeed=zero3", "model.dtype=bfloat16", "data.images=null"],
}
RESUMED = ("zero3", "varied", "bfloat16", "zero3_bfloat16")


def train(name: str, folder: Path, processes: ranks.Processes) -> None:
    """Train one scenario into `folder`."""
    train_scenario("vit_cifar10_vlora_tiny", [*COMMON, *SCENARIOS[name]], folder, processes)


def main() -> None:
    """Train every scenario, and resume some of them from the middle in a folder of their own."""
    quiet_libraries()
    out, processes = Path(sys.argv[-1]), ranks.start()
    for name in SCENARIOS:
        train(name, out / name, processes)
    for name in RESUMED:
        again = out / f"{name}-resumed"
        if processes.is_main_process:
            shutil.copytree(out / name / "checkpoints" / "step-3", again / "checkpoints" / "step-3")
        train(name, again, processes)
    ranks.stop()


if __name__ == "__main__":
    main()
