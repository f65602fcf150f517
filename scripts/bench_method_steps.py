"""Time a training step of our adapter methods against the nearest kept implementation, in one interleaved run.

  python scripts/bench_method_steps.py [--rounds 15] [--adapters-python PYTHON] [--only METHOD,...]

LoRA's relatives are timed against PEFT's LoRA of the same rank, prompts against PEFT's own forward pass, the bottleneck
adapters and a fusion of two against the library `adapters` (AdapterHub). That needs an older transformers, so it has an
interpreter of its own: PYTHON of an environment with `pip install adapters torch`. Both processes stand ready, and take
turns step by step. A step is forward, backward and AdamW of a LLaMA of random weights (8 layers of width 576, 4 x 128
tokens, float32, one thread). Exits with 1 when a ratio is above its bound.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
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
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2")
PEFT = "peft:"  # before the name of a method: as PEFT has it
FUSION = "adapter_fusion"
# ours -> the configuration of `adapters`, its arguments
BOTTLENECKS: dict[str, tuple[str, dict[str, Any]]] = {
    "houlsby": ("DoubleSeqBnConfig", {"reduction_factor": 16, "non_linearity": "gelu_new"}),
    "pfeiffer": ("SeqBnConfig", {"reduction_factor": 16, "non_linearity": "relu"}),
    "parallel_adapter": ("ParBnConfig", {"reduction_factor": 16, "non_linearity": "relu"}),
    "compacter": ("CompacterConfig", {"reduction_factor": 16, "non_linearity": "gelu_new"}),
}
FOREIGN = [*BOTTLENECKS, FUSION]
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
    """Return the model with one of our methods, or with a method of PEFT by PEFT itself."""
    from peft import get_peft_model

    from glora_llm.adapters.config import adapter_config
    from glora_llm.adapters.inject import inject
    from glora_llm.schema import AdapterSection

    if method == FUSION:
        return fusion()
    section = AdapterSection(method=method.removeprefix(PEFT), rank=UNITS if method in BOTTLENECKS else RANK)
    if method.startswith(PEFT):
        return get_peft_model(llama(), adapter_config(section, 0, 100)).train()
    return inject(llama(), section, seed=0, steps=100).train()


def fusion() -> Any:
    """Return the model with a fusion of two adapters."""
    from glora_llm.adapters.inject import inject
    from glora_llm.schema import AdapterSection

    with tempfile.TemporaryDirectory() as folder:
        sources = [f"{folder}/{seed}" for seed in range(2)]
        for seed, source in enumerate(sources):
            inject(llama(), AdapterSection(method="pfeiffer", rank=UNITS), seed=seed, steps=1).save_pretrained(source)
        return inject(llama(), AdapterSection(method=FUSION, peft={"adapters": sources}), seed=0, steps=100).train()


def theirs(method: str) -> Any:
    """Return the model with an adapter of `adapters`."""
    import adapters

    model, (kind, arguments) = llama(), BOTTLENECKS["pfeiffer" if method == FUSION else method]
    adapters.init(model)
    names = ["one", "two"] if method == FUSION else ["one"]
    for name in names:
        model.add_adapter(name, config=getattr(adapters, kind)(**arguments))
    if method == FUSION:
        model.add_adapter_fusion(names)
        model.train_adapter_fusion(adapters.composition.Fuse(*names))
    else:
        model.train_adapter("one")
        model.set_active_adapters("one")
    return model.train()


def serve(is_foreign: bool, only: list[str]) -> None:
    """Do the steps that are asked for by name on standard input, and answer with their seconds."""
    torch.set_num_threads(1)
    names = FOREIGN if is_foreign else [*RELATIVES, *PROMPTS, *FOREIGN]
    names = [name for name in names if not only or name in only]
    if not is_foreign:
        names += [LORA, *(PEFT + name for name in names if name in PROMPTS)]
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

    def __init__(self, python: str, role: str, only: list[str]):
        command = [python, __file__, "--serve", role, "--only", ",".join(only)]
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
    parser.add_argument("--only", default="", help="methods, by commas; all where none is named")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    if arguments.serve:
        serve(arguments.serve == "theirs", only)
        return 0
    workers = {"ours": Worker(sys.executable, "ours", only)}
    pairs = [(("ours", name), ("ours", LORA)) for name in RELATIVES]
    pairs += [(("ours", name), ("ours", PEFT + name)) for name in PROMPTS]
    if arguments.adapters_python:
        workers["theirs"] = Worker(arguments.adapters_python, "theirs", only)
        pairs += [(("ours", name), ("theirs", name)) for name in FOREIGN]
    pairs = [pair for pair in pairs if not only or pair[0][1] in only]
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
        of_adapters = {name: kind for name, (kind, _) in BOTTLENECKS.items()} | {FUSION: "Fuse of two SeqBnConfig"}
        is_peft = other[0] == "ours"
        against = f"PEFT's {other[1].removeprefix(PEFT)}" if is_peft else f"adapters {of_adapters[other[1]]}"
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
