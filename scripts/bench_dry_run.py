"""Compare a dry run with the import of the modules that it loads, in CPU time, each in processes of its own.

python scripts/bench_dry_run.py [--recipe tiny_cpu] [--rounds 3]     # exit code 1 above 1.3

Run it on a quiet machine: CPU time grows too where caches are shared.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOST = 1.3  # times the imports


def main() -> int:
    """Measure in turn, print the medians; return 1 where a dry run takes more than MOST times its imports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="tiny_cpu", help="(default: tiny_cpu)")
    parser.add_argument("--rounds", type=int, default=3, help="of both, after one that fills caches (default: 3)")
    parser.add_argument("--child", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        return _child(arguments.recipe, arguments.child)
    with tempfile.TemporaryDirectory() as folder:
        modules = Path(folder) / "modules.json"
        _seconds("--recipe", arguments.recipe, "--child", str(modules))
        rounds = [
            (
                _seconds("--recipe", arguments.recipe, "--child", str(modules)),
                _seconds("--child", str(modules), "--recipe", ""),
            )
            for _ in range(arguments.rounds)
        ]
    dry, imports = (statistics.median(pair[side] for pair in rounds) for side in (0, 1))
    ratio = dry / imports
    print(f"dry run of {arguments.recipe}: {dry:.1f} s of CPU time, its imports {imports:.1f} s, {ratio:.2f} times")
    return int(ratio > MOST)


def _seconds(*words: str) -> float:
    """Return the CPU time of one child process."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def _child(recipe: str, modules: Path) -> int:
    """Do a dry run and note what it loaded; without a recipe, import what was noted. Print the CPU time."""
    if recipe:
        from glora_llm.cli import main as command

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            code = command(["train", "--recipe", recipe, f"output.dir={folder}/run", "--dry-run"])
        modules.write_text(json.dumps(list(sys.modules)), encoding="utf-8")
    else:
        code = 0
        for name in json.loads(modules.read_text(encoding="utf-8")):
            with contextlib.suppress(ImportError):  # modules that others made while they were imported
                importlib.import_module(name)
    print(time.process_time())
    return code


if __name__ == "__main__":
    raise SystemExit(main())
