"""`glora-llm vlora show`: what the layers of a run share, and how large its increments are."""

import argparse
from pathlib import Path
from typing import Any

SHOW = """\
Print which layers of a VLoRA run share what: layers to a base, ranks, gains and parameters of each
linear; and the size of each layer's increments at some steps, the M step of the VLoRA paper. The
picture shows them by step, and by layer at the end. A run that has not ended is shown as far as it
came. No weight is loaded.

examples:
  glora-llm vlora show runs/vlora_lm_tiny                      writes increments.png
  glora-llm vlora show runs/vlora_lm_tiny --out sizes.svg      .png, .svg or .pdf"""


def add_show(actions: Any, style: Any) -> None:
    """Add `vlora show` to the actions of `glora-llm vlora`."""
    command = actions.add_parser("show", help="what the layers of a run share", description=SHOW, formatter_class=style)
    command.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    command.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("increments.png"), help="(default: increments.png)"
    )
    command.set_defaults(command=show)


def show(arguments: argparse.Namespace) -> int:
    """Run `glora-llm vlora show`."""
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.report.sharing import show_sharing

    show_sharing(arguments.run, arguments.out)
    return 0
