"""Small trainings that one launch runs one after the other: every ZeRO stage, storage and optimizer."""

from dataclasses import dataclass
from pathlib import Path

from glora_llm import recipe as recipes
from glora_llm.launch.ranks import Processes
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.train import train_plan
from glora_llm.schema import Recipe

GLOBAL_BATCH = 8
CHECKPOINT = 3  # step from which a scenario is trained again
COMMON = [
    "data.packing=true",
    "data.max_rows=160",
    "data.max_test_rows=16",
    "data.validation=16",
    "data.max_tokens=192",
    "training.steps=5",
    "training.warmup=0",
    "training.lr=2e-3",
    f"training.global_batch={GLOBAL_BATCH}",
    f"output.save_every={CHECKPOINT}",
    "output.keep=5",
]


@dataclass(frozen=True)
class Scenario:
    """One training.

    Args:
        name: of its run folder.
        reference: the scenario whose losses it follows; its own name: none.
        overrides: of the recipe.
        is_resumed: it is trained again from its checkpoint.
        needs_gpu: it cannot run on a CPU.
    """

    name: str
    reference: str
    overrides: tuple[str, ...]
    is_resumed: bool = True
    needs_gpu: bool = False


def _stage(name: str) -> Scenario:
    return Scenario(f"{name}-nf4", "zero0-nf4", (f"training.deepspeed={name}", "model.quantization=nf4"))


def _optimizer(name: str, needs_gpu: bool) -> Scenario:
    overrides = ("training.deepspeed=zero2", "model.quantization=nf4", f"training.optimizer={name}")
    return Scenario(f"zero2-nf4-{name}", "zero0-nf4", overrides, needs_gpu=needs_gpu)


def _storage(stage: str, quantization: str, reference: str, is_resumed: bool) -> Scenario:
    overrides = (f"training.deepspeed={stage}", f"model.quantization={quantization}")
    return Scenario(f"{stage}-{quantization}", reference, overrides, is_resumed)


SCENARIOS = (
    *map(_stage, ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")),
    _optimizer("adamw_8bit", needs_gpu=False),
    _optimizer("paged_adamw", needs_gpu=True),
    _optimizer("paged_adamw_8bit", needs_gpu=True),
    _storage("zero0", "none", "zero0-none", is_resumed=False),
    _storage("zero3", "none", "zero0-none", is_resumed=True),
    _storage("zero1", "int8", "zero1-int8", is_resumed=False),
    _storage("zero2", "int8", "zero1-int8", is_resumed=True),
)


def recipe_of(scenario: Scenario, model: str, world_size: int, folder: Path) -> Recipe:
    """Return the recipe of a scenario: the same global batch on any number of processes."""
    micro_batch = max(1, GLOBAL_BATCH // world_size // 2)
    more = [f"model.name_or_path={model}", f"training.micro_batch={micro_batch}", f"output.dir={folder}"]
    free = ["model.dtype=auto"]
    return recipes.load("tiny_cpu", [*COMMON, *free, *scenario.overrides, *more])


def train(scenario: Scenario, model: str, folder: Path, processes: Processes) -> None:
    """Train one scenario into a folder."""
    recipe = recipe_of(scenario, model, processes.world_size, folder)
    plan = make_plan(recipe, world_size=processes.world_size)
    train_plan(plan, RunFolder(folder), processes)
