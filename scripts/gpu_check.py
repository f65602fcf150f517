"""Check everything that depends on GPUs: on one GPU, or on all of a machine, in about ten minutes.

  python scripts/gpu_check.py [--device cuda|cpu] [--out DIR] [--only 1 2 4]

The checks run in order; the first failure ends them with its cause and exit code 1. OUT/gpu_check.json holds every
value, and a table of what was expected and what was measured is printed and written to OUT/gpu_check.md. With
--device cpu all of it is rehearsed on tiny models, in two processes where several are needed; what a CPU has no twin
for says so.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Run the checks and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu_check")))
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of the checks to run")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, str(ROOT))  # the checks are scripts too, no part of the package
    from scripts.gpu_checks.run import run

    return run(arguments.device, arguments.out, arguments.only)


if __name__ == "__main__":
    raise SystemExit(main())
