"""Does a killed run end where an uninterrupted one ends? Both are run and compared; the proof is a JSON file.

The runs are launches of `glora-llm train` in processes of their own. One is left alone. The other gets SIGKILL,
launcher and processes at once, as soon as metrics.jsonl shows a step, and is started again, perhaps on another number
of processes, until it ends.
"""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from glora_llm.errors import CheckFailed, UserError
from glora_llm.launch.device import choose_device
from glora_llm.launch.machine import hardware, versions
from glora_llm.plan.run_folder import RunFolder

COMPARED = ("train/loss", "train/lr", "train/grad_norm")
POLL = 0.05  # seconds between two looks at the metrics


@dataclass(frozen=True)
class Trial:
    """One comparison of a killed run with an uninterrupted one.

    Args:
        recipe: a name or path, as on the command line.
        overrides: changes to it, for both runs.
        processes: of the uninterrupted run and of each first start.
        then: of every second start; the same number: bytes must be identical.
        kills: optimizer steps after which the run is killed, rising.
        tolerance: largest relative difference of losses and of the adapter where the numbers differ.
        out: a new folder.
    """

    recipe: str
    overrides: tuple[str, ...]
    processes: int
    then: int
    kills: tuple[int, ...]
    tolerance: float
    out: Path


def kill_points(steps: int, count: int, seed: int) -> tuple[int, ...]:
    """Return so many different steps before the last, rising, drawn by a seed.

    Raises:
        UserError: when there are not so many.
    """
    if not 1 <= count < steps:
        raise UserError(f"--kills is {count}, and a run of {steps} steps has {max(steps - 1, 0)} before its last.")
    return tuple(sorted(random.Random(seed).sample(range(1, steps), count)))


def verify(trial: Trial) -> dict[str, Any]:
    """Run both, compare them, and write OUT/proof.json; return what it holds.

    Raises:
        CheckFailed: when they differ, or a run ends otherwise than it should; the proof is written if both ended.
    """
    whole, killed = RunFolder(trial.out / "whole"), RunFolder(trial.out / "killed")
    trial.out.mkdir(parents=True)
    _train(_command(trial, whole.path, trial.processes))
    starts: list[dict[str, Any]] = []
    for number, step in enumerate(trial.kills):
        processes = (trial.processes, trial.then)[number % 2]
        last = _kill_after(_command(trial, killed.path, processes), killed.path, step)
        starts.append({"processes": processes, "killed_after_step": last})
        print(f"killed after step {last} on {processes} processes; starting the same command again", flush=True)
    processes = (trial.processes, trial.then)[len(trial.kills) % 2]
    _train(_command(trial, killed.path, processes))
    starts.append({"processes": processes, "killed_after_step": None})
    proof = proof_of(trial, whole, killed, starts)
    (trial.out / "proof.json").write_text(json.dumps(proof, indent=1) + "\n", encoding="utf-8")
    if not proof["passed"]:
        raise CheckFailed(f"{_verdict(proof)}. What was found: {trial.out / 'proof.json'}")
    print(f"{_verdict(proof)}: {trial.out / 'proof.json'}")
    return proof


def _command(trial: Trial, folder: Path, processes: int) -> list[str]:
    """Return the launch of one run; every step is logged, so that it can be killed after any."""
    changes = [*trial.overrides, "training.log_every=1", f"output.dir={folder}"]
    return [sys.executable, "-m", "glora_llm", "train", "--gpus", str(processes), "--recipe", trial.recipe, *changes]


def _train(launch: Sequence[str]) -> None:
    """Run a launch to its end."""
    code = subprocess.run(launch, check=False).returncode
    if code:
        raise CheckFailed(f"A run that was left alone ended with exit code {code}: {' '.join(launch[2:])}")


def _kill_after(launch: Sequence[str], folder: Path, step: int) -> int:
    """Start a launch, kill it once it has logged a step, and return the last step that it logged."""
    with subprocess.Popen(launch, start_new_session=True) as process:
        while max(_logged(folder, "train/loss"), default=0) < step:
            if process.poll() is not None:
                raise CheckFailed(f"The run ended by itself, with exit code {process.returncode}, before step {step}.")
            time.sleep(POLL)
        root = psutil.Process(process.pid)
        for member in [root, *root.children(recursive=True)]:
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:  # it went with its parent
                continue
    return max(_logged(folder, "train/loss"))


def _logged(folder: Path, key: str) -> dict[int, float]:
    """Return step -> value of one metric; a line that is being written is left out."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def proof_of(trial: Trial, whole: RunFolder, killed: RunFolder, starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what both runs came to, where they ran, and whether they agree."""
    recipe = whole.recipe()
    name = "model.safetensors" if recipe.adapter.is_full else "adapter_model.safetensors"
    files = [folder.trained(recipe) / name for folder in (whole, killed)]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    losses = [_logged(folder.path, "train/loss") for folder in (whole, killed)]
    equal = {key: _logged(whole.path, key) == _logged(killed.path, key) for key in COMPARED}
    identical = hashes[0] == hashes[1] and all(equal.values()) and bool(losses[0])
    differences = {"weights": _weights_apart(*files), "losses": _losses_apart(*losses)}
    near = max(differences.values()) <= trial.tolerance
    return {
        "recipe": (whole.path / "recipe.yaml").read_text(encoding="utf-8"),
        "command": f"glora-llm train --recipe {trial.recipe} {' '.join(trial.overrides)}".strip(),
        "base": json.loads((whole.path / "base.json").read_text(encoding="utf-8")),
        "processes": trial.processes,
        "starts": starts,
        "sha256": dict(zip(("uninterrupted", "killed"), hashes, strict=True)),
        "identical": identical,
        "equal_metrics": equal,
        "relative_difference": differences,
        "tolerance": 0.0 if trial.then == trial.processes else trial.tolerance,
        "passed": identical if trial.then == trial.processes else near,
        "losses": dict(zip(("uninterrupted", "killed"), losses, strict=True)),
        "versions": versions(),
        "hardware": hardware(choose_device().type),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _weights_apart(first: Path, second: Path) -> float:
    """Return |a - b| / |a| over all trained weights (Frobenius norms)."""
    a, b = load_file(first), load_file(second)
    if a.keys() != b.keys():
        raise CheckFailed(f"{first} and {second} hold tensors of other names.")
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    size = sum(float(value.double().square().sum()) for value in a.values())
    return (apart / size) ** 0.5 if size else 0.0


def _losses_apart(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Return the largest relative difference of the losses of a step."""
    if first.keys() != second.keys() or not first:
        raise CheckFailed("The runs logged other steps.")
    return max(abs(first[step] - second[step]) / max(abs(first[step]), 1e-30) for step in first)


def _verdict(proof: Mapping[str, Any]) -> str:
    kills = ", ".join(str(start["killed_after_step"]) for start in proof["starts"][:-1])
    counts = "/".join(str(start["processes"]) for start in proof["starts"])
    apart = proof["relative_difference"]
    where = f"killed after step {kills}, started on {counts} processes"
    if proof["identical"]:
        return f"{where}: the same bytes as the run that was left alone"
    sizes = f"weights {apart['weights']:.1e} and losses {apart['losses']:.1e}"
    return f"{where}: {sizes} (relative) from the run that was left alone"
