"""`glora-llm merge`: write the merged model of a run."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm.plan.run_folder import RunFolder

MERGE = """\
Write the trained adapter into the model, or write it as a plain LoRA, and check that both answer
alike.

examples:
  glora-llm merge runs/llama2_glora --out merged             loads in stock transformers
  glora-llm merge runs/llama2_glora --out lora --to lora     exact, as a PEFT LoRA adapter
  glora-llm merge runs/llama2_glora --out merged --quantize nf4  4 bits, and what that costs
  glora-llm merge runs/llama2_glora --out merged --step 400  a kept checkpoint instead of the last

The two are compared on the sample that the run kept, else on text that ships; the run's data need
not be here. A result that changes the answers by more than the recipe's merge.* bounds ends with
exit code 1."""


def add_command(commands: Any, style: Any) -> None:
    """Add `merge` to the parser of `glora-llm`."""
    parser = commands.add_parser("merge", help="write the merged model", description=MERGE, formatter_class=style)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run folder (output.dir of the recipe)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_argument("--to", choices=("model", "lora"), default="model", help="a whole model (default) or a LoRA")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the written weights (default: the recipe's)"
    )
    parser.add_argument(
        "--quantize", choices=("none", "nf4", "nf4_lossless"), help="write 4 bits (default: the recipe's)"
    )
    parser.add_argument("--genome", metavar="FILE", type=Path, help="of a supernet (default: RUN/genome.json)")
    parser.add_argument("--step", metavar="N", type=int, help="merge the checkpoint of this step (default: the last)")
    parser.add_argument(
        "--no-compare", dest="compared", action="store_false", help="write the result without comparing it"
    )
    parser.set_defaults(command=merge)


def merge(arguments: argparse.Namespace) -> int:
    """Run `glora-llm merge`."""
    RunFolder(arguments.run).recipe()  # is it a run? Before the slow imports
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.merge.command import merge_run

    given = vars(arguments)
    names = ("dtype", "to", "quantize", "step", "genome", "compared")
    merge_run(arguments.run, arguments.out, **{name: given[name] for name in names})
    return 0
