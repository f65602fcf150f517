"""Chooses structures within a budget, and trains in even scaling, in one launch.

deepspeed --num_gpus RANKS tests/training/structure_worker.py OUT
"""

import sys
from pathlib import Path

from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from tests.training.scenarios import train_scenario
from tests.training.worker import DIVIDED

COMMON = [
    *(
        "training.steps=2",
        "training.warmup=0",
        "training.global_batch=16",
        "training.micro_batch=4",
        "training.lr=auto",
    ),
    *("data.max_rows=200", "data.packing=true", "data.max_tokens=192", "model.quantization=nf4"),
    *("adapter.slots=null", "adapter.scaling=even", "adapter.budget=4000", "adapter.budget_rows=60"),
    *("adapter.predictor=agreement", "output.save_every=2"),
]
STAGES = {"zero1": ["training.deepspeed=zero1"], "zero3": [f"training.deepspeed={DIVIDED}"]}
SHORT = ["adapter.predictor=short_run", "adapter.budget_rows=32", "training.steps=8"]
SCENARIOS = STAGES | {f"short-{name}": [*more, *SHORT] for name, more in STAGES.items()}


def main() -> None:
    """Train every scenario into a folder of its name."""
    quiet_libraries()
    out, processes = Path(sys.argv[-1]), ranks.start()
    for name, more in SCENARIOS.items():
        train_scenario("tiny_cpu", [*COMMON, *more], out / name, processes)
    ranks.stop()


if __name__ == "__main__":
    main()
