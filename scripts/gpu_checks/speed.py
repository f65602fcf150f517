"""Check 7: a step of a 7B shape in nf4: time, utilisation and memory, beside LoRA and what is computed."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from glora_llm import recipe as recipes
from glora_llm.adapters.inject import inject, without_adapter
from glora_llm.adapters.weights import trainables
from glora_llm.data.batch import collate
from glora_llm.launch import ranks
from glora_llm.models.attention import attention_arguments, packed_arguments
from glora_llm.models.load import compile_layers
from glora_llm.plan.memory import GB, compute_memory
from glora_llm.report.timing import interleaved, ratio
from glora_llm.schema import AdapterSection, ModelSection, Recipe
from glora_llm.training.batch import to_device
from glora_llm.training.deepspeed_config import resolve_deepspeed_config
from glora_llm.training.engine import Engine
from glora_llm.training.flops import ModelCost, measure_cost
from glora_llm.training.objectives import CausalLMObjective
from scripts.gpu_checks.attention import packed_row
from scripts.gpu_checks.context import Context
from scripts.gpu_checks.random_model import config_of, random_nf4_model
from scripts.gpu_checks.report import Row, absent, compared, information

LORA = AdapterSection(method="lora", rank=16, alpha=32.0)  # as many parameters as the default GLoRA
RATIO = 1.05  # most that a step with GLoRA may take of one with LoRA
MEMORY = 1.15  # most that may be measured, of what is computed
ROUNDS = 5
COLUMNS = (9, 16)  # of the thin product with W0: r + 1, and padded


@dataclass
class Subject:
    """One model that is measured.

    Args:
        recipe: of which this is the model, with random weights.
        engine: steps it.
        batch: one micro batch of packed rows.
        cost: floating-point operations of a step.
    """

    recipe: Recipe
    engine: Engine
    batch: dict[str, Any]
    cost: ModelCost

    def step(self) -> None:
        """Run one optimizer step of one micro batch."""
        self.engine.train_step([self.batch], 1e-4)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()

    def describe(self, seconds: float) -> str:
        """Return what a step of so many seconds comes to, in words."""
        tokens, width = self.engine.objective.extent(self.batch)
        flops = self.cost.step_flops(tokens, len(self.batch["targets"]), width)
        share = flops / seconds / self.cost.peak_flops
        return f"{seconds:.3f} s a step, {tokens / seconds:.0f} tokens/s, {share:.1%} of the peak rate"


def check(context: Context) -> Iterator[Row]:
    """Measure GLoRA and LoRA in turns, then compiled, a batch of one row, and a large vocabulary."""
    ranks.start()
    shape, large = ("rehearsal", "rehearsal") if context.is_rehearsal else ("LLaMA-2-7B", "Llama-3-8B")
    subjects = {"GLoRA": _subject(context, shape, AdapterSection()), "LoRA r 16": _subject(context, shape, LORA)}
    yield _syncs(context, subjects["GLoRA"])
    times = interleaved({name: subject.step for name, subject in subjects.items()}, ROUNDS)
    for name, subject in subjects.items():
        seconds = statistics.median(times[name])
        yield information(f"{shape}, nf4, {name}", subject.describe(seconds), seconds=seconds)
    share = ratio(times, "GLoRA", "LoRA r 16")
    yield _bounded(context, "time of GLoRA / LoRA", share, RATIO)
    del subjects
    yield from _memory(context, shape, AdapterSection())
    yield from _compiled(context, shape)
    one = _subject(context, shape, AdapterSection(), rows=1)
    seconds = _median(one.step)
    yield information(f"{shape}, one row", one.describe(seconds), seconds=seconds)
    del one
    yield from _memory(context, large, AdapterSection())
    yield _thin_product(context)
    ranks.stop()


def _subject(context: Context, shape: str, adapter: AdapterSection, rows: int = 4, compiled: bool = False) -> Subject:
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    tokens = 64 if context.is_rehearsal else 1024
    overrides = ["training.deepspeed=zero2", f"training.micro_batch={rows}", f"training.global_batch={rows}"]
    recipe = recipes.load("llama2_glora", [*overrides, f"data.max_tokens={tokens}"])
    recipe = recipe.model_copy(update={"adapter": adapter})
    section = ModelSection(name_or_path="none", compile=compiled)
    attention = attention_arguments(section, config_of(shape), context.device, context.dtype)
    model = random_nf4_model(shape, context.device, context.dtype, **attention)
    adapted = inject(model, adapter, seed=0, steps=1)
    bare: Any = without_adapter(adapted)
    if compiled:
        compile_layers(bare)
    items, config = trainables(adapted, adapter, 1.0), resolve_deepspeed_config(recipe.training, context.dtype, 1)
    objective = CausalLMObjective(bare, partial(packed_arguments, bare.config._attn_implementation))
    engine = Engine(objective, items, recipe.training, config, context.device)
    batch = collate([packed_row(tokens, bare.config.vocab_size, seed) for seed in range(rows)], pad_id=0)
    cost = measure_cost(bare, bare.config, context.dtype, context.device)
    return Subject(recipe, engine, batch, cost)


def _median(step: Callable[[], None]) -> float:
    return statistics.median(interleaved({"": step}, ROUNDS)[""])


def _bounded(context: Context, item: str, share: float, bound: float) -> Row:
    """Compare on a GPU; a rehearsal's times say nothing."""
    if context.is_rehearsal:
        return information(item, f"{share:.2f}", share=share)
    return compared(item, f"at most {bound}", f"{share:.3f}", share <= bound, share=share)


def _syncs(context: Context, subject: Subject) -> Row:
    """Count how often forward and backward of one micro batch wait for the GPU."""
    item = "waits for the GPU in a micro batch"
    if context.device.type != "cuda":
        return absent(item, "a CPU never waits; tests count the operations that would")
    subject.step()
    batch = to_device(subject.batch, context.device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subject.engine.objective(**batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    return compared(item, "none", str(len(found)), not found, messages=found[:5])


def _memory(context: Context, shape: str, adapter: AdapterSection) -> Iterator[Row]:
    """Compare the peak of a few steps with what is computed from shapes."""
    folder = context.out / shape
    config_of(shape).save_pretrained(folder)
    subject = _subject(context, shape, adapter)
    memory = compute_memory(subject.recipe, folder, 1, context.dtype)
    item = f"{shape}: peak memory of a step"
    if context.device.type != "cuda":
        subject.step()
        yield absent(item, f"counted on a GPU alone; computed {memory.training / GB:.2f} GB")
        return
    torch.cuda.reset_peak_memory_stats(context.device)
    for _ in range(2):
        subject.step()
    peak = torch.cuda.max_memory_allocated(context.device)
    wanted = f"at most {MEMORY} x {memory.training / GB:.2f} GB, computed"
    ok = peak <= MEMORY * memory.training
    yield compared(item, wanted, f"{peak / GB:.2f} GB", ok, peak=peak, computed=memory.training)


def _compiled(context: Context, shape: str) -> Iterator[Row]:
    item = f"{shape}, nf4, GLoRA, model.compile"
    if context.is_rehearsal:
        yield absent(item, "tests compile a layer on the CPU")
        return
    subject = _subject(context, shape, AdapterSection(), compiled=True)
    began = time.perf_counter()
    subject.step()
    first = time.perf_counter() - began
    seconds = _median(subject.step)
    yield information(item, f"{subject.describe(seconds)}, {first:.0f} s for the first", seconds=seconds, first=first)


def _thin_product(context: Context) -> Row:
    """Time W0 times few columns as they are, and padded to a multiple of 16 bytes."""
    size = 256 if context.is_rehearsal else 4096
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator, device="cpu").to(context.device, context.dtype)
    seconds = {}
    for columns in COLUMNS:
        factor = weight[:, :columns].contiguous()
        context.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            weight @ factor
        context.synchronize()
        seconds[columns] = (time.perf_counter() - began) / 20
    text = ", ".join(f"{1e6 * value:.0f} us with {columns} columns" for columns, value in seconds.items())
    return information(f"W0 ({size}, {size}) times a thin factor", text, seconds=seconds)
