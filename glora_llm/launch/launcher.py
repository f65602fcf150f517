"""The launcher above this process: whether it still runs, and the command that the user gave it."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

STARTER = "GLORA_STARTER"  # number of the process that started this one alone (`glora-llm compare`), and waits for it
COMMAND = "GLORA_COMMAND"  # `glora-llm train --gpus` hands its own command line down in it
RUNNERS = {"deepspeed", "ds", "deepspeed.launcher.runner"}


class Launcher:
    """The processes that started this one, as it finds them when it begins.

    `deepspeed` (or `glora-llm train --gpus`) starts DeepSpeed's launch.py, which starts the processes that train;
    torchrun starts them itself. A process that no launcher started has none, and may outlive its shell; but not the
    process that the variable GLORA_STARTER numbers.

    Attributes:
        parent: launch.py or torchrun; None without a launcher.
        runner: what started launch.py on this machine, and what the user sees; None where there is none.
        starter: the process that GLORA_STARTER numbers; None: there is none, or it ended before.
        command: the command line that the user gave, as a shell takes it.
    """

    def __init__(self) -> None:
        self.parent: psutil.Process | None = None
        self.runner: psutil.Process | None = None
        if {"LOCAL_SIZE", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
            try:
                self.parent = psutil.Process(os.getppid())
                self.runner = _runner(self.parent)
            except psutil.Error:  # it ends just now: `is_gone` will say so
                self.runner = None
        self.starter = _process(os.environ[STARTER]) if STARTER in os.environ else None
        self.command = _command(os.environ, self.runner or self.parent)

    def is_gone(self) -> bool:
        """Tell whether the launcher ended while this process runs."""
        if self.parent is None:
            return STARTER in os.environ and not _lives(self.starter)
        try:
            return os.getppid() != self.parent.pid or (
                self.runner is not None and self.parent.ppid() != self.runner.pid
            )
        except psutil.Error:
            return True


def _process(number: str) -> psutil.Process | None:
    try:
        return psutil.Process(int(number))
    except psutil.NoSuchProcess:
        return None


def _lives(process: psutil.Process | None) -> bool:
    """Tell whether a process runs still: one that nobody has waited for yet (a zombie) does not."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _runner(parent: psutil.Process) -> psutil.Process | None:
    above = parent.parent() if "LOCAL_SIZE" in os.environ else None
    if above is None:
        return None
    names = {Path(text).name for text in above.cmdline()[:3]}
    return above if COMMAND in os.environ or names & RUNNERS else None


def _command(environment: Mapping[str, str], launcher: psutil.Process | None) -> str:
    """Return the command that starts this launch again."""
    if COMMAND in environment:
        return environment[COMMAND]
    if "SLURM_PROCID" in environment and launcher is None:
        return f"scontrol requeue {environment['SLURM_JOB_ID']}"
    try:
        argv = launcher.cmdline() if launcher is not None else sys.orig_argv
    except psutil.Error:
        argv = sys.orig_argv
    return written(argv, environment)


def written(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return a command line as a user writes it: a script that the shell finds goes by its name.

    Args:
        environment: its `DS_ACCELERATOR` stands before the command.
    """
    script = Path(argv[1]) if len(argv) > 1 else Path()
    found = shutil.which(script.name) if script.name else None
    shown = [script.name, *argv[2:]] if found is not None and Path(found) == script else list(argv)
    accelerator = environment.get("DS_ACCELERATOR")
    return f"{f'DS_ACCELERATOR={accelerator} ' if accelerator else ''}{shlex.join(shown)}"
