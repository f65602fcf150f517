"""`glora-llm report`: runs as one HTML file."""

import argparse
from pathlib import Path
from typing import Any

REPORT = """\
Write what runs did into one HTML file, to be sent to others: scores, curves, speed and memory, what
was trained layer by layer, a search's frontier, samples, how exactly the merge answers, the recipe,
and the command, versions and hardware that give it again. It needs no network and no script, and
can be read on a phone, in the dark and in print.

examples:
  glora-llm report runs/quickstart                          writes report.html
  glora-llm report runs/lora runs/glora --out both.html     compares them, then shows each
  glora-llm report runs/comparison                          a folder that `glora-llm compare` wrote

Several runs begin with their curves in one figure and the settings that differ. A run that has not
ended is reported as far as it came. An earlier report is replaced; any other file is not."""


def add_command(commands: Any, style: Any) -> None:
    """Add `report` to the parser of `glora-llm`."""
    command = commands.add_parser(
        "report", help="write runs as one HTML file", description=REPORT, formatter_class=style
    )
    command.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="run folders, or folders of `glora-llm compare`"
    )
    command.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("report.html"), help="the file to write (default: report.html)"
    )
    command.set_defaults(command=report)


def report(arguments: argparse.Namespace) -> int:
    """Run `glora-llm report`."""
    from glora_llm.report.page import write_report

    write_report(arguments.runs, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB; open it in a browser")
    return 0
