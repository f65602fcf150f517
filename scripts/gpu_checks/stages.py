"""Checks 4 and 5: each ZeRO stage, storage and optimizer trains and is resumed; several processes are as one."""

import json
import math
from collections.abc import Iterator

from glora_llm.launch import ranks
from scripts.gpu_checks.context import Context
from scripts.gpu_checks.launching import finish, metrics, summary
from scripts.gpu_checks.report import Row, absent, compared, information
from scripts.gpu_checks.scenarios import CHECKPOINT, SCENARIOS, Scenario, train

LIKE_REFERENCE = 0.02  # relative difference of a loss; a device adds in another order
RESUMED = {"cpu": 1e-5, "cuda": 0.01}  # the CPU repeats a run, but for the scales of 8-bit moments
GATHERED = 1.1  # bytes of all processes over those of the model
SCALES = {"nf4": 0.04, "none": 0.0}  # and of what is not divided, for each further process


def check(context: Context) -> Iterator[Row]:
    """Train all scenarios in one launch, and compare their losses."""
    out = context.out / "stages"
    out.mkdir()
    finish(context, "scripts.gpu_checks.stages_worker", context.model, str(out))
    for scenario in SCENARIOS:
        if scenario.needs_gpu and context.is_rehearsal:
            yield absent(scenario.name, "it pages from a GPU to the CPU")
            continue
        yield _like_reference(context, scenario)
        if scenario.is_resumed:
            yield _resumed(context, scenario)


def check_processes(context: Context) -> Iterator[Row]:
    """Compare several processes with one that accumulates, and add up what ZeRO 3 divides."""
    out, world = context.out / "stages", context.processes
    if world == 1:
        yield absent("several processes", "one GPU")
        return
    one = SCENARIOS[1]
    processes = ranks.start()
    train(one, context.model, out / f"{one.name}-alone", processes)
    ranks.stop()
    several, alone = (metrics(out / name, "train/loss") for name in (one.name, f"{one.name}-alone"))
    yield _close(f"{one.name}: {world} processes are one with accumulation", several, alone, LIKE_REFERENCE)
    for storage in ("nf4", "none"):
        held, whole = (summary(out / f"{stage}-{storage}")["bytes_per_rank"] for stage in ("zero3", "zero0"))
        share = held * world / whole
        item, bound = f"ZeRO 3, {storage}: bytes of all {world}", GATHERED + SCALES[storage] * (world - 1)
        yield compared(item, f"at most {bound:.2f} x the model", f"{share:.2f} x", share <= bound, share=share)
    gathered = json.loads((out / "gathered.json").read_text(encoding="utf-8"))
    text = f"{gathered['whole']} of {gathered['divided']} parameters"
    yield compared("ZeRO 3: left whole after a step and a score", "none", text, gathered["whole"] == 0, **gathered)
    for storage in ("nf4", "none"):
        facts = summary(out / f"zero3-{storage}")
        text = f"{facts['load_peak_gb']:.2f} GB while loading, {facts['peak_memory_gb']:.2f} GB in training"
        yield information(f"ZeRO 3, {storage}: peak of the first process", text)


def _like_reference(context: Context, scenario: Scenario) -> Row:
    out = context.out / "stages"
    losses = metrics(out / scenario.name, "train/loss")
    if scenario.name == scenario.reference:
        first, last = losses[1], losses[max(losses)]
        ok = math.isfinite(last) and last < first
        return compared(scenario.name, "a falling loss", f"{first:.4f} to {last:.4f}", ok, losses=losses)
    return _close(scenario.name, losses, metrics(out / scenario.reference, "train/loss"), LIKE_REFERENCE)


def _resumed(context: Context, scenario: Scenario) -> Row:
    out = context.out / "stages"
    again = metrics(out / f"{scenario.name}-resumed", "train/loss")
    whole = {step: loss for step, loss in metrics(out / scenario.name, "train/loss").items() if step > CHECKPOINT}
    bound = RESUMED[context.device.type]
    return _close(f"{scenario.name}, resumed after step {CHECKPOINT}", again, whole, bound)


def _close(item: str, got: dict[int, float], wanted: dict[int, float], bound: float) -> Row:
    """Compare the losses of the same steps."""
    same_steps = bool(wanted) and got.keys() == wanted.keys()
    worst = max((abs(got[step] / wanted[step] - 1) for step in wanted), default=math.nan) if same_steps else math.nan
    measured = f"{worst:.1e} apart" if same_steps else f"steps {sorted(got)} instead of {sorted(wanted)}"
    return compared(item, f"the same losses within {bound:.0e}", measured, worst <= bound, losses=got)
