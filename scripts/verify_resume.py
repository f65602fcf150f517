"""Does a killed run end where an uninterrupted one ends? Trains a recipe twice and compares the results bit for bit.

  python scripts/verify_resume.py --recipe smollm2_glora --ranks 2 --kill-after 10 \\
      training.steps=20 training.deepspeed=zero3 model.quantization=nf4 output.save_every=5

The first run is left alone. The second gets SIGKILL, launcher and ranks at once, as soon as metrics.jsonl shows
`--kill-after` steps; then the same command is started again. Adapter bytes, losses, learning rates and gradient norms
must be equal. Exits with 1 when they are not. On a CPU in float32 equality is exact; GPU kernels may not promise it.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

COMPARED = ("train/loss", "train/lr", "train/grad_norm")


def main() -> int:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kill-after", type=int, required=True, help="steps")
    parser.add_argument("--out", type=Path, default=Path("runs/verify_resume"))
    parser.add_argument("overrides", nargs="*", help="section.key=value for both runs")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    whole, killed = arguments.out / "whole", arguments.out / "killed"
    train(command(arguments, whole))
    last = kill_after(command(arguments, killed), killed, arguments.kill_after)
    print(f"killed after step {last}; starting the same command again", flush=True)
    train(command(arguments, killed))
    return compare(whole, killed)


def command(arguments: Any, folder: Path) -> list[str]:
    """Return the launch of one run."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    ranks = ["--num_gpus", str(arguments.ranks)]
    overrides = [*arguments.overrides, f"output.dir={folder}"]
    return [sys.executable, launcher, *ranks, "train.py", "--recipe", arguments.recipe, *overrides]


def environment() -> dict[str, str]:
    """Return the environment of a launch: ninja is found beside this Python."""
    return os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def train(launch: list[str]) -> None:
    """Run a launch to its end."""
    subprocess.run(launch, check=True, env=environment())


def kill_after(launch: list[str], folder: Path, steps: int) -> int:
    """Start a launch, kill it when it has logged so many steps, and return the last step that it logged."""
    with subprocess.Popen(launch, env=environment(), start_new_session=True) as process:
        while (last := max(logged(folder, "train/loss"), default=0)) < steps:
            if process.poll() is not None:
                raise SystemExit(f"the run ended by itself, with {process.returncode}, before step {steps}")
            time.sleep(0.05)
        root = psutil.Process(process.pid)
        for member in [root, *root.children(recursive=True)]:
            member.send_signal(signal.SIGKILL)
    return last


def logged(folder: Path, key: str) -> dict[int, float]:
    """Return step -> value of one metric; a line that is being written is left out."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def compare(whole: Path, killed: Path) -> int:
    """Print what is equal; return the exit code."""
    name = "adapter/adapter_model.safetensors"
    results = {"adapter bytes": (whole / name).read_bytes() == (killed / name).read_bytes()}
    for key in COMPARED:
        results[key] = bool(logged(whole, key)) and logged(whole, key) == logged(killed, key)
    for what, equal in results.items():
        print(f"{what:20s} {'equal' if equal else 'DIFFERENT'}")
    return int(not all(results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
