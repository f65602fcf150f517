"""Start trials as processes of their own, one a GPU or some on the cores of a CPU, and end them with this process."""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil

from glora_llm.compare.starting import Forked, NewInterpreter, Started, Starter
from glora_llm.errors import UserError
from glora_llm.launch.launcher import COMMAND, STARTER, written
from glora_llm.launch.run_lock import RunLock
from glora_llm.launch.stop import EXIT_CODE

T = TypeVar("T")
R = TypeVar("R")
OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
POLL_SECONDS = 0.2
LOCK_SECONDS = 120.0  # a trial that a killed comparison left behind writes a checkpoint, and ends


class Ending(Exception):
    """The comparison is told to end; raised in the threads that wait for trials."""


def slots(jobs: int | None) -> list[dict[str, str]]:
    """Return the environment of each place where a trial can run: a GPU each, else shares of the cores.

    Args:
        jobs: trials at once; None: one a GPU, or one a core.

    Raises:
        UserError: for more than there are GPUs or cores.
    """
    from glora_llm.launch.device import choose_device

    if "RANK" in os.environ:
        raise UserError("compare starts its trials itself, and a launcher started it (RANK is set): start it without.")
    is_gpu, cores = choose_device().type == "cuda", len(os.sched_getaffinity(0))
    if is_gpu:
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        there, what = names[: torch.cuda.device_count()], "GPUs"
    else:
        there, what = [""] * cores, "cores"
    count = len(there) if jobs is None else jobs
    if not 0 < count <= len(there):
        raise UserError(f"--jobs is {jobs}; expected 1 to {len(there)}: there are {len(there)} {what}.")
    threads = {"OMP_NUM_THREADS": str(max(1, cores // count))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": name} if is_gpu else {}) for name in there[:count]]


class Pool:
    """Runs commands, at most one in each slot.

    Args:
        places: environment of each slot, as of `slots`.

    Attributes:
        ending: the comparison is told to end.
        running: processes that train now.
        busy_seconds: time in which at least one process ran.
    """

    def __init__(self, places: Sequence[Mapping[str, str]]):
        self.jobs = len(places)
        self.free: queue.Queue[Mapping[str, str] | None] = queue.Queue()  # None: no trial begins any more
        for place in places:
            self.free.put(place)
        self.ending = threading.Event()
        self.running: dict[int, Started] = {}
        self.lock = threading.Lock()
        on_gpus = any("CUDA_VISIBLE_DEVICES" in place for place in places)
        threads = places[0].get("OMP_NUM_THREADS", "1")
        self.starter: Starter = NewInterpreter() if on_gpus else Forked(threads)
        self.busy_seconds, self.busy_since = 0.0, 0.0

    def run(self, arguments: Sequence[str], folder: Path, log: Path, begin: Callable[[], None]) -> tuple[int, float]:
        """Run `glora-llm ARGUMENTS` in a free slot; return its exit code, and its seconds.

        Args:
            folder: of the run; another process that still writes it is waited for.
            log: its output is added to this file.
            begin: called when it starts.

        Raises:
            Ending: when the comparison is told to end.
        """
        place = self._take()
        try:
            self._wait_for(folder)
            log.parent.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            process = self._start(arguments, place, log)
            begin()
            return self._wait(process), time.monotonic() - began
        finally:
            self.free.put(place)

    def _take(self) -> Mapping[str, str]:
        place = self.free.get()
        if place is None:
            self.free.put(None)  # for the next thread that waits
            raise Ending
        return place

    def _wait_for(self, folder: Path) -> None:
        limit = time.monotonic() + LOCK_SECONDS
        while RunLock(folder).holder() is not None and time.monotonic() < limit:
            if self.ending.wait(POLL_SECONDS):
                raise Ending

    def _start(self, arguments: Sequence[str], place: Mapping[str, str], log: Path) -> Started:
        environment = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCH}
        environment |= {STARTER: str(os.getpid()), COMMAND: written(sys.orig_argv, os.environ)} | dict(place)
        with self.lock:
            if self.ending.is_set():
                raise Ending
            process = self.starter.start(arguments, environment, log)
            if not self.running:
                self.busy_since = time.monotonic()
            self.running[process.pid] = process
        return process

    def _wait(self, process: Started) -> int:
        while (code := self._poll(process)) is None:
            time.sleep(POLL_SECONDS)
        with self.lock:
            del self.running[process.pid]
            if not self.running:
                self.busy_seconds += time.monotonic() - self.busy_since
        if self.ending.is_set() and code == EXIT_CODE:
            raise Ending
        return code

    def _poll(self, process: Started) -> int | None:
        with self.lock:  # starting a process of multiprocessing polls the others
            return process.poll()

    @contextmanager
    def ended_with_this(self) -> Iterator[None]:
        """Tell all trials to end when the block ends with an exception, and wait until they have their checkpoints."""
        try:
            yield
        except BaseException:
            self.end()
            while self.running:
                time.sleep(POLL_SECONDS)
            raise

    def end(self) -> None:
        """Let no further trial begin, and tell those that run to end."""
        self.ending.set()
        self.free.put(None)
        with self.lock:
            for pid in self.running:
                _tell(pid)


def _tell(pid: int) -> None:
    """Send SIGTERM to a trial."""
    try:
        psutil.Process(pid).terminate()
    except psutil.NoSuchProcess:  # it ended just now
        return


def in_parallel(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return what `work` makes of each item, in threads; the first exception is raised when all have ended."""
    results: dict[int, R] = {}
    failures: list[BaseException] = []

    def one(number: int, item: T) -> None:
        try:
            results[number] = work(item)
        except Exception as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in enumerate(items)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(items))]
