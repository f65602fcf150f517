"""`glora-llm import`: read an adapter that another package trained."""

import argparse
from pathlib import Path
from typing import Any

IMPORT = """\
Read an adapter that another package trained into GLoRA's slots: exactly the same function on the
same base. The result is a run folder: merge it, export it, score it, train it further.

examples:
  glora-llm import my_lora --base meta-llama/Llama-2-7b-hf --out runs/imported
  glora-llm import my_lora --out runs/imported          the base that the adapter names
  glora-llm import my_qlora --quantization nf4 --dtype bfloat16 --out runs/imported
  glora-llm import net.safetensors --base MODEL --out runs/imported  LyCORIS's GLoRA
  glora-llm merge runs/imported --out merged            then, as of any run
  glora-llm train --recipe runs/imported/recipe.yaml data.source=my.jsonl data.format=chat

Read: PEFT's LoRA (rsLoRA, patterns, lora_bias), HiRA, IA3 and GLoRA; LyCORIS's GLoRA of linears.
What has no exact form is refused, with the layer and the reason."""


def add_command(commands: Any, style: Any) -> None:
    """Add `import` to the parser of `glora-llm`."""
    command = commands.add_parser(
        "import", help="read an adapter of PEFT or LyCORIS", description=IMPORT, formatter_class=style
    )
    command.add_argument("folder", metavar="FOLDER", type=Path, help="the adapter: a folder, or a .safetensors file")
    command.add_argument("--base", metavar="MODEL", help="the base model, as model.name_or_path (default: its own)")
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="the run folder to write")
    command.add_argument(
        "--quantization",
        choices=("none", "nf4", "fp4", "int8"),
        default="none",
        help="of the base that it was trained on (default: none)",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what that base was computed in (default: float32)",
    )
    command.set_defaults(command=import_adapter)


def import_adapter(arguments: argparse.Namespace) -> int:
    """Run `glora-llm import`."""
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.foreign import importing

    a = arguments
    importing.import_adapter(a.folder, a.base, a.out, a.quantization, a.dtype)
    return 0
