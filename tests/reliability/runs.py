"""Start runs through the fork server, let them fail at named places, and compare what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glora_llm.failpoints import VARIABLE
from glora_llm.launch.ranks import free_port
from tests.training.launching import PYTHONPATH

ROOT = Path(__file__).parents[2]
LONGEST = 300.0  # seconds of one run


@dataclass
class Run:
    """One process that runs `glora-llm`.

    Args:
        server: that started it.
        pid: its process number.
        log: the file of its output.
        began: when it was started (time.monotonic).
    """

    server: "Server"
    pid: int
    log: Path
    began: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float = LONGEST) -> int:
        """Return its exit code; negative: of the signal that killed it."""
        limit = time.monotonic() + seconds
        while (code := self.server.ask({"poll": self.pid})) is None:
            if time.monotonic() > limit:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {seconds:.0f} s:\n{self.said()}")
            time.sleep(0.02)
        assert isinstance(code, int)
        return code

    def said(self) -> str:
        """Return its output."""
        return self.log.read_text() if self.log.exists() else ""


class Server:
    """The fork server of a test module.

    Args:
        folder: of the logs.
        cache: GLORA_CACHE of the runs.
    """

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.number = folder, 0
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {"PATH": path, "PYTHONPATH": PYTHONPATH, "GLORA_CACHE": str(cache), "DS_ACCELERATOR": "cpu"}
        environment |= {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "reliability" / "fork_server.py")], cwd=ROOT,
            env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, request: dict[str, Any]) -> Any:
        """Return the server's answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def start(self, *arguments: str, failpoint: str = "", **environment: str) -> Run:
        """Start `glora-llm ARGUMENTS`."""
        self.number += 1
        log = self.folder / f"{self.number}.log"
        environment |= {VARIABLE: failpoint} if failpoint else {}
        request = {"arguments": list(arguments), "environment": environment, "log": str(log)}
        return Run(self, self.ask(request), log)

    def start_two(
        self, *arguments: str, failpoints: tuple[str, str] = ("", ""), caches: tuple[str, str] = ("", "")
    ) -> tuple[Run, Run]:
        """Start `glora-llm ARGUMENTS` as a launch of two processes, as Slurm does: no launcher is between.

        Args:
            caches: GLORA_CACHE of each; empty: the server's.
        """
        launch = self.folder / f"launch-{self.number}"
        launch.mkdir()
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GLORA_LAUNCH": str(launch)}
        first, second = (
            self.start(
                *arguments,
                failpoint=failpoint,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                **group,
                **({"GLORA_CACHE": cache} if cache else {}),
            )
            for rank, (failpoint, cache) in enumerate(zip(failpoints, caches, strict=True))
        )
        return first, second

    def run(self, *arguments: str, failpoint: str = "", **environment: str) -> tuple[int, str]:
        """Return the exit code and the output of `glora-llm ARGUMENTS`."""
        run = self.start(*arguments, failpoint=failpoint, **environment)
        return run.wait(), run.said()

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Return the names of temporary files and folders anywhere below."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def logged(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return (step, losses, norms and scores) of every line of metrics.jsonl, in its order; times are left out."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    same = ("train/loss", "train/lr", "train/grad_norm", "validation/")
    return [(line["step"], {name: line[name] for name in line if name.startswith(same)}) for line in lines]


def logged_values(folder: Path, key: str) -> dict[int, float]:
    """Return step -> value of one metric."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}
