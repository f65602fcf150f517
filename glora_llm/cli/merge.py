"""`glora-llm merge`: write the merged model of a run."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError
from glora_llm.plan.run_folder import RunFolder
from glora_llm.schema.slots import SLOTS

MERGE = """\
Write the trained adapter into the model, or as a plain LoRA, and check that both answer alike.

examples:
  glora-llm merge runs/llama2_glora --out merged             loads in stock transformers
  glora-llm merge runs/llama2_glora --out merged --for vllm  or says what vLLM would drop
  glora-llm merge runs/llama2_glora --out lora --to lora     exact, as a PEFT LoRA adapter
  glora-llm merge runs/llama2_glora --out merged --quantize nf4  4 bits, and what that costs
  glora-llm merge runs/llama2_glora --out merged --step 400  a kept checkpoint instead of the end

They are compared on the sample that the run kept, else on text that ships; the run's data need not
be here. A result outside the recipe's merge.* bounds ends with exit code 1."""


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
    parser.add_argument("--best", action="store_true", help="merge what validated best (evaluation.keep_best)")
    parser.add_argument(
        "--for",
        dest="target",
        choices=("transformers", "vllm", "sglang", "llama.cpp"),
        help="what will serve it: refused where it drops anything (llama.cpp: GGUF)",
    )
    parser.add_argument(
        "--without", metavar="SLOTS", help="leave slots out (C,E) and say what that costs; with --for: where dropped"
    )
    parser.add_argument("--both", action="store_true", help="of --to lora: the whole adapter too, beside --without")
    parser.add_argument(
        "--max-loss-change", metavar="NATS", type=float, help="what --without may cost (default: the recipe's)"
    )
    parser.add_argument(
        "--no-compare", dest="compared", action="store_false", help="write the result without comparing it"
    )
    parser.set_defaults(command=merge)


def merge(arguments: argparse.Namespace) -> int:
    """Run `glora-llm merge`."""
    RunFolder(arguments.run).recipe()  # is it a run? Before the slow imports
    if arguments.best and arguments.step is not None:
        raise UserError(f"--best and --step {arguments.step} both choose a checkpoint: give one of them.")
    given = vars(arguments)
    names = ("dtype", "to", "quantize", "step", "genome", "compared", "target", "both", "max_loss_change")
    choices = {name: given[name] for name in names} | {"without": read_slots(arguments.without)}
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.merge.command import merge_run
    from glora_llm.plan.trained_weights import best_step

    if arguments.best:
        choices["step"] = best_step(RunFolder(arguments.run))
    merge_run(arguments.run, arguments.out, **choices)
    return 0


def read_slots(text: str | None) -> tuple[str, ...]:
    """Return the slots that `--without` names (`C,E`), in their usual order.

    Raises:
        UserError: for what is no slot.
    """
    if text is None:
        return ()
    given = [part.strip().upper() for part in text.split(",") if part.strip()]
    if not given or not set(given) <= set(SLOTS):
        raise UserError(f"--without {text}: expected slots among {', '.join(SLOTS)}, such as --without C,E.")
    return tuple(slot for slot in SLOTS if slot in given)
