"""Print a message once a launch, whichever of its processes have it to say."""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from glora_llm.launch.outputs import drop_full_output

PREFIX = "glora_llm-launch"


def print_error(message: str) -> None:
    """Print an error, unless another process of this launch has printed the same one."""
    key = hashlib.sha256(message.encode(errors="backslashreplace")).hexdigest()[:16]  # of words that are no UTF-8 too
    print_once(f"error: {message}", key)


def print_once(text: str, key: str) -> None:
    """Print a text on standard error, unless a process of this launch has printed one under the same key.

    Checks come before the processes meet, so all of them find the same mistake, each by itself; another mistake may
    be found by one process alone. The one that prints a message says so in a file, and holds the file's lock until
    the message is out: a process that finds it printed may end, and with it the launch.
    """
    folder = launch_folder()
    if folder is None:
        _print(text)
        return
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        note = (folder / key).open("a", encoding="utf-8")
    except OSError:  # nowhere to say it: better twice than never
        _print(text)
        return
    with note:
        fcntl.flock(note, fcntl.LOCK_EX)  # released with the file, or with the process
        if os.fstat(note.fileno()).st_size == 0:
            _print(text)
            note.write("printed\n")
            note.flush()


def _print(text: str) -> None:
    """Print on standard error; where that is full, the exit code alone says that something is wrong."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        drop_full_output()


def was_said(key: str) -> bool:
    """Tell whether a process of this launch has begun to print something under this key."""
    folder = launch_folder()
    return folder is not None and (folder / key).exists()


def count_as_said(key: str) -> None:
    """Let `was_said` be true for a key, and `print_once` print nothing under it."""
    folder = launch_folder()
    if folder is not None:
        with contextlib.suppress(OSError):  # nowhere to note it
            folder.mkdir(mode=0o700, exist_ok=True)
            (folder / key).write_text("printed\n", encoding="utf-8")


def launch_folder() -> Path | None:
    """Return a folder that the processes of this launch have in common and no other launch has; it need not exist.

    `GLORA_LAUNCH` names it (scripts/slurm_train.sh makes one that all machines see, and removes it). Below DeepSpeed's
    launcher or torchrun it is one in the temporary folder, named after the launcher, and the next launch removes it.
    None: no launcher started this process.
    """
    if "GLORA_LAUNCH" in os.environ:
        return Path(os.environ["GLORA_LAUNCH"])
    if not {"LOCAL_SIZE", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return None
    here = Path(tempfile.gettempdir())
    for old in here.glob(f"{PREFIX}-{os.getuid()}-*"):
        if _started(int(old.name.split("-")[-3])) != old.name.split("-")[-2]:
            shutil.rmtree(old, ignore_errors=True)
    launcher, started = _launcher()
    return here / f"{PREFIX}-{os.getuid()}-{launcher}-{started}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


@functools.cache  # when the launcher is gone, another process is the parent
def _launcher() -> tuple[int, str | None]:
    """Return the process number of the launcher, and when it was started."""
    return os.getppid(), _started(os.getppid())


def _started(pid: int) -> str | None:
    """Return when a process was started, or None when there is none: a pid alone is used again."""
    import psutil

    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
