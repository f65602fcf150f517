"""Start the processes of a launch by DeepSpeed's launcher: `glora-llm train --gpus N` or `--hostfile FILE`."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from glora_llm.errors import UserError
from glora_llm.launch.launcher import COMMAND, written
from glora_llm.launch.stop import EXIT_CODE, SIGNALS

HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")
HERE = "localhost"


def require_no_launcher() -> None:
    """Check that this process may start others.

    Raises:
        UserError: when a launcher started it.
    """
    if "RANK" in os.environ:
        raise UserError(
            "--gpus and --hostfile start the processes themselves, and a launcher started this one (RANK is set). "
            "Leave them out below deepspeed, torchrun or srun."
        )


def local_processes(text: str) -> int:
    """Return the number of processes that `--gpus` asks for on this machine: one for each GPU, or CPU processes.

    Raises:
        UserError: when it is no number above 0 and not `all`, or more than this machine has.
    """
    if text != "all" and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise UserError(f"--gpus is '{text}'; expected a number above 0, or all.")
    import torch

    from glora_llm.launch.device import choose_device

    if choose_device().type == "cuda":
        there = default = torch.cuda.device_count()
        limit = f"torch sees {there} GPUs (CUDA_VISIBLE_DEVICES)"
    else:
        there, default = len(os.sched_getaffinity(0)), 1
        limit = f"without a GPU it is one process a core at most, {there} here"
    number = default if text == "all" else int(text)
    if number > there:
        raise UserError(f"--gpus is {number}; {limit}.")
    return number


def read_hostfile(file: Path) -> dict[str, int]:
    """Return the machines of a hostfile and the number of processes on each.

    Raises:
        UserError: when it is not there, names no machine or one twice, or a line is not `NAME slots=NUMBER`.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {file} cannot be read: {error}.") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = HOST_LINE.fullmatch(line)
        if match is None or int(match[2]) == 0:
            raise UserError(f"{file}, line {number}: '{line[:80]}'; expected a machine and its GPUs, as: node1 slots=8")
        if match[1] in hosts:
            raise UserError(f"{file}, line {number}: {match[1]} stands there twice; give each machine one line.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{file} names no machine; expected a line for each, as: node1 slots=8")
    return hosts


def is_here(hosts: Mapping[str, int]) -> bool:
    """Tell whether this machine is the only one."""
    return set(hosts) <= {HERE, "127.0.0.1", socket.gethostname(), socket.getfqdn()} and len(hosts) == 1


def run_here(processes: int, arguments: Sequence[str]) -> int:
    """Run `glora-llm ARGUMENTS` as so many processes on this machine, and return the launch's exit code."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",")[:processes] if visible else list(range(processes))
    if len(devices) < processes:  # CPU processes beside hidden GPUs
        devices = list(range(processes))
    world = base64.urlsafe_b64encode(json.dumps({HERE: devices}).encode()).decode()
    return _run(["deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"], arguments, here=True)


def run_on(hosts: Mapping[str, int], file: Path, arguments: Sequence[str]) -> int:
    """Run `glora-llm ARGUMENTS` on the machines of a hostfile, and return the launch's exit code.

    Raises:
        UserError: when pdsh or ssh is missing, or the first machine does not answer.
    """
    missing = [name for name in ("pdsh", "ssh") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"--hostfile needs {' and '.join(missing)}, which this machine lacks: install it, or use Slurm."
        )
    first = next(iter(hosts))
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", first, "hostname", "-I"]
    answer = subprocess.run(ssh, capture_output=True, text=True, check=False)
    if answer.returncode or not answer.stdout.split():
        raise UserError(f"{file}: {first} cannot be reached ({shlex.join(ssh)}): {answer.stderr.strip()[-300:]}")
    address = f"--master_addr={answer.stdout.split()[0]}"
    runner = ["deepspeed.launcher.runner", f"--hostfile={file}", "--no_ssh_check", "--force_multi", address]
    return _run(runner, arguments, here=False)


def _run(launcher: Sequence[str], arguments: Sequence[str], here: bool) -> int:
    """Run DeepSpeed's launcher to its end; a signal to this process goes to the processes that train.

    The launcher is in a session of its own: what a terminal sends would make it kill them after 30 seconds.
    """
    from glora_llm.launch.ranks import free_port

    options = [f"--master_port={free_port()}", "--module", "--no_local_rank", "--log_level=critical", "glora_llm"]
    environment = os.environ | {COMMAND: written(sys.orig_argv, os.environ)}
    environment.setdefault("DS_LOG_LEVEL", "error")
    command = [sys.executable, "-u", "-m", *launcher, *options, *arguments]
    told: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        _send(process, number, here)

    taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        before = {number: signal.signal(number, pass_on) for number in taken}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return EXIT_CODE if told and code == -signal.SIGTERM else exit_code(code)


def _send(process: "subprocess.Popen[bytes]", number: int, here: bool) -> None:
    """Pass a signal on to the training processes of this machine; DeepSpeed's launcher reaches those of others."""
    try:
        training = psutil.Process(process.pid).children() if here else []
        for child in training:
            child.send_signal(number)
        if not training:  # the launcher has started none so far
            process.send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:  # it ended just now
        return


def exit_code(code: int) -> int:
    """Return a launch's exit code as a shell gives it: 128 + the signal that killed a process.

    DeepSpeed's launcher exits with the negative number of the signal, of which the lowest 8 bits remain.
    """
    number = -code if code < 0 else 256 - code
    return 128 + number if 0 < number <= 64 else code
