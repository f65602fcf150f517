"""Dense against VLoRA: loss by step, by time and by bytes of parameters, of runs that have ended.

  python scripts/compare_vlora.py RUN_A RUN_B [RUN ...] [--out comparison.png]

Runs whose `vlora` section is the same are of one kind (seeds, say) and share a colour. Prints a table: parameters, test
score, seconds, peak memory, bytes of a checkpoint.
"""

import argparse
import sys
from pathlib import Path

from glora_llm.errors import UserError
from glora_llm.report.comparison import loss_figure, read_run, table


def main() -> int:
    """Read, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="the picture (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        runs = [read_run(run) for run in arguments.runs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(runs))
    loss_figure(runs).savefig(arguments.out, dpi=150)
    print(f"\n{arguments.out} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
