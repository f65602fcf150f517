"""Time a training step of our adapter methods against the nearest kept implementation, in one interleaved run.

  python scripts/bench_method_steps.py [--rounds 15] [--adapters-python PYTHON]

LoRA's relatives are timed against PEFT's LoRA of the same rank, the bottleneck adapters against the library `adapters`
(AdapterHub). That needs an older transformers, so it has an interpreter of its own: PYTHON of an environment with
`pip install adapters torch`. Both processes stand ready, and take turns step by step. A step is forward, backward and
AdamW of a LLaMA of random weights (8 layers of width 576, 4 x 128 tokens, float32, one thread).
Exits with 1 when a ratio is above its bound.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 4096, "attn_implementation": "sdpa",
}  # fmt: skip
UNITS = 36  # of a bottleneck: width / 16
RANK = 8
LORA = "lora"  # PEFT's
RELATIVES = ("lora_dropout", "periodic_lora", "lors")
# ours -> the configuration of `adapters`, its arguments
BOTTLENECKS: dict[str, tuple[str, dict[str, Any]]] = {
    "houlsby": ("DoubleSeqBnConfig", {"reduction_factor": 16, "non_linearity": "gelu_new"}),
    "pfeiffer": ("SeqBnConfig", {"reduction_factor": 16, "non_linearity": "relu"}),
    "parallel_adapter": ("ParBnConfig", {"reduction_factor": 16, "non_linearity": "relu"}),
    "compacter": ("CompacterConfig", {"reduction_factor": 16, "non_linearity": "gelu_new"}),
}
BOUND = 1.05


def llama() -> Any:
    """Return a LLaMA of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def step_of(model: Any) -> Callable[[], None]:
    """Return a function that does one step of a model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.arange(4 * 128).reshape(4, 128)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(method: str) -> Any:
    """Return the model with one of our methods, or with PEFT's LoRA."""
    from glora_llm.adapters.inject import inject
    from glora_llm.schema import AdapterSection

    rank = UNITS if method in BOTTLENECKS else RANK
    return inject(llama(), AdapterSection(method=method, rank=rank), seed=0, steps=100).train()  # type: ignore[arg-type]


def theirs(method: str) -> Any:
    """Return the model with an adapter of `adapters`."""
    import adapters

    model, (kind, arguments) = llama(), BOTTLENECKS[method]
    adapters.init(model)
    model.add_adapter("it", config=getattr(adapters, kind)(**arguments))
    model.train_adapter("it")
    model.set_active_adapters("it")
    return model.train()


def serve(is_foreign: bool) -> None:
    """Do the steps that are asked for by name on standard input, and answer with their seconds."""
    torch.set_num_threads(1)
    names = [*BOTTLENECKS] if is_foreign else [LORA, *RELATIVES, *BOTTLENECKS]
    models = {name: theirs(name) if is_foreign else ours(name) for name in names}
    steps = {name: step_of(model) for name, model in models.items()}
    trained = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    print("ready", *(f"{name}={count}" for name, count in trained.items()), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        steps[line.strip()]()
        print(time.perf_counter() - began, flush=True)


class Worker:
    """A process that does steps.

    Attributes:
        trained: parameters that each method trains.
    """

    def __init__(self, python: str, role: str):
        command = [python, __file__, "--serve", role]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.trained: dict[str, int] = {}

    def wait(self) -> None:
        """Wait until its models are there."""
        while not (line := self._line()).startswith("ready "):
            pass
        counts = (word.split("=") for word in line.split()[1:])
        self.trained = {name: int(count) for name, count in counts}

    def seconds(self, name: str) -> float:
        """Return the seconds of a step."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a process ended; its message is above")
        return line


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--adapters-python", help="an interpreter that has adapters; without it these are left out")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve == "theirs")
        return 0
    workers = {"ours": Worker(sys.executable, "ours")}
    pairs = [(("ours", name), ("ours", LORA)) for name in RELATIVES]
    if arguments.adapters_python:
        workers["theirs"] = Worker(arguments.adapters_python, "theirs")
        pairs += [(("ours", name), ("theirs", name)) for name in BOTTLENECKS]
    for worker in workers.values():
        worker.wait()
    print(
        "| method | parameters | against | parameters | step ms | against ms | ratio |\n|---|---|---|---|---|---|---|"
    )
    worst = 0.0
    for own, other in pairs:
        times = [[workers[who].seconds(name) for who, name in (own, other)] for _ in range(arguments.rounds + 2)][2:]
        share = statistics.median(first / second for first, second in times)
        seconds = [statistics.median(each) for each in zip(*times, strict=True)]
        against = "PEFT's LoRA" if other[0] == "ours" else f"adapters {BOTTLENECKS[other[1]][0]}"
        counts = [workers[who].trained[name] for who, name in (own, other)]
        cells = [
            own[1],
            f"{counts[0]:,}",
            against,
            f"{counts[1]:,}",
            *(f"{1e3 * each:.0f}" for each in seconds),
            f"{share:.3f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        worst = max(worst, share)
    for worker in workers.values():
        worker.process.kill()
    print(f"\n{'kept' if worst <= BOUND else 'NOT KEPT'}: at most {worst:.3f} (bound {BOUND})")
    return int(worst > BOUND)


if __name__ == "__main__":
    raise SystemExit(main())
