"""Start trials: as new interpreters, or forked from a process that has imported the libraries, which is quicker."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Protocol

IMPORTED = "glora_llm.run.imported"  # the module that the forking process imports once


class Started(Protocol):
    """A trial that runs.

    Attributes:
        pid: of its process.
    """

    pid: int

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""


class Starter(Protocol):
    """A way to start a trial."""

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Started:
        """Run `glora-llm ARGUMENTS` in a session of its own, with this environment; its output is added to a file."""


class NewInterpreter:
    """Starts each trial as `python -m glora_llm`. On GPUs: CUDA does not outlive a fork."""

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Started:
        """Run `glora-llm ARGUMENTS`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "glora_llm", *arguments], env=dict(environment), stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip


class Forked:
    """Starts each trial as a fork of a process that has torch, transformers and DeepSpeed: about 9 s of a core less.

    The process is Python's fork server, started with the first trial.

    Args:
        threads: value of OMP_NUM_THREADS, which torch reads when it is imported.
    """

    def __init__(self, threads: str):
        self.threads = threads
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([IMPORTED])

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Started:
        """Run `glora-llm ARGUMENTS`."""
        os.environ["OMP_NUM_THREADS"] = self.threads  # the fork server is a child of this process
        process = self.context.Process(target=_run, args=(list(arguments), dict(environment), str(log)))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is not for the fork server
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return _ForkedTrial(process)


class _ForkedTrial:
    """A process of the fork server, in the terms of subprocess.Popen."""

    def __init__(self, process: ForkServerProcess):
        assert process.pid is not None
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self.process.exitcode


def _run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Run a command line in the forked process, and end it with its exit code."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with open(log, "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["glora-llm", *arguments]
    try:
        runpy.run_module("glora_llm", run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of the fork server ends without
