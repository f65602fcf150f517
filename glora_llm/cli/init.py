"""`glora-llm init`: write a recipe for a file of the user's own."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm import recipe
from glora_llm.atomic import require_new
from glora_llm.errors import UserError

INIT = """\
Look at a file or folder of records and write a small commented recipe that fits it and this
machine. Nothing is asked.

examples:
  glora-llm init my.jsonl                       writes my.yaml
  glora-llm init data/ --out recipes/mine.yaml  a folder with train.jsonl, validation.jsonl ...
  glora-llm init my.csv --task classification   where several formats would fit
  glora-llm init my.jsonl --base meta-llama/Llama-2-7b-hf

Read: json, jsonl, csv, tsv, parquet, txt. Formats: chat, alpaca, prompt_completion, classification,
text."""


def add_command(commands: Any, style: Any) -> None:
    """Add `init` to the parser of `glora-llm`."""
    command = commands.add_parser("init", help="write a recipe for your data", description=INIT, formatter_class=style)
    command.add_argument("data", metavar="DATA", help="a file, or a folder with a file for each split")
    command.add_argument("--out", metavar="FILE", type=Path, help="the recipe to write (default: NAME.yaml)")
    command.add_argument("--base", metavar="MODEL", help="the base model, as model.name_or_path (default: by machine)")
    command.add_argument("--task", metavar="FORMAT", help="the data format (default: by the columns)")
    command.set_defaults(command=init)


def init(arguments: argparse.Namespace) -> int:
    """Run `glora-llm init`: look at the records, write the recipe, and say what to do next.

    Raises:
        UserError: when the records cannot be read or fit no format, or the recipe is there already.
    """
    out = arguments.out or Path(f"{Path(arguments.data).stem}.yaml")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out is {out}; a recipe's name ends in .yaml.")
    require_new(out)
    from glora_llm.launch.quiet import bars_on_terminals_only
    from glora_llm.plan import new_recipe

    bars_on_terminals_only()
    gpu_bytes = _gpu_bytes()
    base = arguments.base or new_recipe.choose_base(gpu_bytes)
    records = new_recipe.look_at(arguments.data, base, arguments.task)
    text = new_recipe.recipe_text(str(out.with_suffix("")), records, base, gpu_bytes is not None)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    recipe.load(str(out))  # what is written loads
    if records.problem:
        print(f"warning: not every record fits format {records.found.format}. The first: {records.problem}")
    print(f"{out}: {records.found.format} ({records.found.reason}), {records.count} training records, {base}")
    print(f"next:  glora-llm train --recipe {out} --dry-run\n       glora-llm train --gpus all --recipe {out}")
    return 0


def _gpu_bytes() -> float | None:
    """Return the memory of the GPU that a run would take, in bytes, or None where it would take the CPU."""
    import torch

    from glora_llm.launch.device import choose_device

    device = choose_device()
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
