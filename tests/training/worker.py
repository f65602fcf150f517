"""Runs many small trainings in one launch of two ranks, because importing the libraries takes longer than they do.

deepspeed --num_gpus 2 tests/training/worker.py OUT
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch import distributed as dist

from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.training import output_head
from glora_llm.training.adam_state import AdamState
from glora_llm.training.optim import Trainable
from tests.training.scenarios import train_scenario

COMMON = [
    "training.steps=6",
    "training.warmup=0",
    "training.global_batch=16",
    "training.micro_batch=4",
    "data.max_rows=200",
    "data.packing=true",
    "data.max_tokens=192",
    "adapter.dropout=0.1",
    "model.quantization=nf4",
    "output.save_every=3",
    "output.keep=5",
]
FLOAT16 = Path(__file__).with_name("float16.json")  # ZeRO 3, and a loss scale that begins too high and rises soon
DIVIDED = Path(__file__).with_name("divided.json")  # ZeRO 3 that keeps no parameter whole, however small
ADALORA = ["adapter.method=adalora", "adapter.slots=null", "adapter.peft={tinit: 1, tfinal: 1, deltaT: 1}"]
PERIODIC = ["adapter.method=periodic_lora", "adapter.slots=null", "adapter.peft={period: 3}"]
SCENARIOS: dict[str, list[str]] = {
    "zero0": ["training.deepspeed=zero0"],
    "zero1": ["training.deepspeed=zero1"],
    "zero2": ["training.deepspeed=zero2"],
    "zero3": ["training.deepspeed=zero3"],
    "zero2_offload": ["training.deepspeed=zero2_offload"],
    "zero3_offload": ["training.deepspeed=zero3_offload"],
    "zero3_checkpointing": ["training.deepspeed=zero3", "model.gradient_checkpointing=true"],
    "no_dropout": ["adapter.dropout=0"],
    "adamw_8bit": ["training.optimizer=adamw_8bit", "training.deepspeed=zero2"],
    "lora": ["adapter.method=lora", "adapter.slots=null", "training.deepspeed=zero2"],
    "adalora": [*ADALORA, "training.deepspeed=zero0"],
    "adalora_zero2": [*ADALORA, "training.deepspeed=zero2"],
    "adalora_zero3": [*ADALORA, f"training.deepspeed={DIVIDED}"],
    "periodic_lora": [*PERIODIC, f"training.deepspeed={DIVIDED}"],
    "bfloat16": ["model.dtype=bfloat16", "training.deepspeed=zero2"],
    "float16": ["model.dtype=float16", f"training.deepspeed={FLOAT16}", "training.max_bad_steps=1"],
    "broken": ["training.lr=1000", "adapter.alpha=1e18", "training.max_grad_norm=0", "training.max_bad_steps=2"],
}
LOGITS_AT_ONCE = output_head.LOGITS_AT_ONCE
RESUMED: tuple[str, ...] = ("zero0", "zero1", "zero3", "zero2_offload", "adamw_8bit", "adalora_zero3", "periodic_lora")
RESUMED += ("bfloat16", "float16")


COLLECTIVES = ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "gather")
gathered: list[int] = []  # collectives of each checkpoint so far, of the scenario that runs


def count_collectives() -> None:
    """Note how many collectives each reading of the optimizer's state takes."""
    calls: list[str] = []

    def noted(collective: Any) -> Any:
        def call(*args: Any, **keys: Any) -> Any:
            calls.append(collective.__name__)
            return collective(*args, **keys)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, noted(getattr(dist, name)))
    gather = AdamState.gather

    def counted(self: AdamState, trainables: Sequence[Trainable]) -> Iterator[tuple[str, Tensor]]:
        before = len(calls)
        yield from gather(self, trainables)
        gathered.append(len(calls) - before)

    AdamState.gather = counted  # type: ignore[method-assign]


def train(name: str, folder: Path, processes: ranks.Processes) -> None:
    """Train one scenario into `folder`."""
    # Processes cut their targets into different numbers of chunks: they must still gather the head equally often.
    output_head.LOGITS_AT_ONCE = 2**12 if name == "zero3_checkpointing" else LOGITS_AT_ONCE
    gathered.clear()
    train_scenario("tiny_cpu", [*COMMON, *SCENARIOS[name]], folder, processes)
    if processes.is_main_process:
        (folder / "collectives.json").write_text(json.dumps(gathered))


def main() -> None:
    """Train every scenario, then resume some of them from the middle in a folder of their own."""
    quiet_libraries()
    get_accelerator().is_fp16_supported = lambda: True  # any CPU computes in it, few fast enough for DeepSpeed's taste
    out, processes = Path(sys.argv[-1]), ranks.start()
    count_collectives()
    for name in SCENARIOS:
        try:
            train(name, out / name, processes)
        except Exception as error:  # noqa: BLE001 - the test reads what it was
            if processes.is_main_process:
                (out / name).mkdir(parents=True, exist_ok=True)
                (out / name / "error.txt").write_text(f"{type(error).__name__}: {error}")
    for name in RESUMED:
        again = out / f"{name}-resumed"
        if processes.is_main_process:
            shutil.copytree(out / name / "checkpoints" / "step-3", again / "checkpoints" / "step-3")
        train(name, again, processes)
    ranks.stop()


if __name__ == "__main__":
    main()
