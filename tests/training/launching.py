"""How tests start ranks, and read what a run logged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from glora_llm.launch.ranks import free_port

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT / "tests" / "no_network"), str(ROOT)])  # no process reaches another machine


def launch(*arguments: str, ranks: int = 2) -> list[str]:
    """Return the command line of a launch of so many CPU ranks."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    return [sys.executable, str(deepspeed), "--num_gpus", str(ranks), "--master_port", free_port(), *arguments]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a launch: CPU ranks, and ninja found where this Python is."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"DS_ACCELERATOR": "cpu", "PATH": path, "PYTHONPATH": PYTHONPATH} | more


def finished(command: list[str], timeout: float = 900, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run a launch to its end, whatever that is, with `more` in its environment."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout, check=False
    )


def metrics(run: Path, key: str) -> dict[int, Any]:
    """Return step -> value of one metric."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}
