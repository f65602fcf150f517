"""Start processes as a user does, and read what a run wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from glora_llm.errors import CheckFailed
from glora_llm.launch.ranks import free_port
from scripts.gpu_checks.context import Context

ROOT = Path(__file__).parents[2]
LAUNCH = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
LONGEST = 500  # seconds of one launch


def start(context: Context, module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start `context.processes` processes by DeepSpeed, in a session of their own; output goes to OUT/launch.log."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    number = ["--num_gpus", str(context.processes), "--master_port", free_port()]
    with (context.out / "launch.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(deepspeed), *number, "--module", module, *arguments],
            cwd=ROOT,
            env=_environment(context),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(context: Context, module: str, *arguments: str) -> None:
    """Run a launch to its end.

    Raises:
        CheckFailed: when it ends with another code than 0; with the end of its output.
    """
    code = start(context, module, *arguments).wait(LONGEST)
    if code:
        raise CheckFailed(f"{module} ended with code {code}. The end of {context.out / 'launch.log'}:\n{tail(context)}")


def tail(context: Context, lines: int = 25) -> str:
    """Return the end of what launches have printed."""
    return "\n".join((context.out / "launch.log").read_text(errors="replace", encoding="utf-8").splitlines()[-lines:])


def metrics(run: Path, key: str) -> dict[int, Any]:
    """Return step -> value of one metric of a run; nothing before its first step."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {line["step"]: line[key] for line in lines if key in line}


def summary(run: Path) -> dict[str, Any]:
    """Return a run's summary.json."""
    return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))


def _environment(context: Context) -> dict[str, str]:
    """Return the environment of a launch: no trace of this process's own group, and ninja where this Python is."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    kept |= {"PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])}
    return kept | ({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if context.is_rehearsal else {})
