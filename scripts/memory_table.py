"""Memory of each GPU, computed from shapes, as Markdown tables for docs/gpu.md. Nothing is measured, no GPU is needed.

python scripts/memory_table.py [--out FILE.md]
"""

import argparse
import datetime
import tempfile
from pathlib import Path

import torch

from glora_llm import recipe as recipes
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.models.random_llama import LLAMA2_7B, LLAMA2_70B, LLAMA3_8B, LlamaShape, llama_config
from glora_llm.plan.memory import GB, ModelSizes, at_rest, model_sizes, step_bytes
from glora_llm.schema import Recipe

# Shape -> (recipe with its adapter, sizes).
SHAPES: dict[str, tuple[str, LlamaShape]] = {
    "LLaMA-2-7B": ("llama2_glora", LLAMA2_7B),
    "Llama-3-8B": ("llama3_glora", LLAMA3_8B),
    "LLaMA-2-70B": ("llama2_70b_glora", LLAMA2_70B),
}
STORAGES = {"nf4": "nf4", "none": "bf16"}
ROWS = (1, 4)  # of 1,024 tokens in a micro batch
WORLDS = (1, 2, 4, 8)
DTYPE = torch.bfloat16


def main() -> None:
    """Print both tables, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        text = tables(Path(folder))
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


def tables(root: Path) -> str:
    """Return both tables under the date and the command that made them.

    Args:
        root: an empty folder, for the configurations of the shapes.
    """
    peaks = ["| model | storage | weights | step, 1 x 1,024 tokens | step, 4 x 1,024 tokens |", "|---|---|---|---|---|"]
    heads = " | ".join(f"{world} GPU{'s' if world > 1 else ''}" for world in WORLDS)
    loads = [f"| model | storage | stage | {heads} |", "|---|---|---|" + "---|" * len(WORLDS)]
    for shape in SHAPES:
        folder = write_config(shape, root)
        for quantization, storage in STORAGES.items():
            recipe = recipe_of(shape, quantization, rows=4)
            sizes = model_sizes(recipe, folder, DTYPE)
            steps = {rows: step_bytes(recipe_of(shape, quantization, rows), folder, DTYPE) for rows in ROWS}
            weights = at_rest(recipe, sizes, 1, DTYPE, step=0).base
            cells = [weights, *steps.values()]
            peaks.append(f"| {shape} | {storage} | " + " | ".join(f"{value / GB:.2f}" for value in cells) + " |")
            loads += [row(shape, storage, stage, sizes, steps[4]) for stage in ("zero2", "zero3")]
    head = f"{datetime.datetime.now(datetime.UTC).date().isoformat()}, `python scripts/memory_table.py`, GB, computed:"
    return "\n".join([head, "", *peaks, "", *loads, ""])


def row(shape: str, storage: str, stage: str, sizes: ModelSizes, step: int) -> str:
    """Return `most while loading / most in training` of one GPU for every number of GPUs."""
    quantization = next(name for name, text in STORAGES.items() if text == storage)
    recipe = recipe_of(shape, quantization, rows=4, more=[f"training.deepspeed={stage}"])
    memory = [at_rest(recipe, sizes, world, DTYPE, step) for world in WORLDS]
    cells = " | ".join(f"{item.loading / GB:.1f} / {item.training / GB:.1f}" for item in memory)
    return f"| {shape} | {storage} | {stage} | {cells} |"


def recipe_of(shape: str, quantization: str, rows: int, more: list[str] | None = None) -> Recipe:
    """Return the recipe of a shape with another storage and micro batch."""
    overrides = [f"model.quantization={quantization}", f"training.micro_batch={rows}", "data.max_tokens=1024"]
    return recipes.load(SHAPES[shape][0], [*overrides, *(more or [])])


def write_config(shape: str, root: Path) -> Path:
    """Write config.json of a shape; return its folder."""
    llama_config(SHAPES[shape][1]).save_pretrained(root / shape)
    return root / shape


if __name__ == "__main__":
    main()
