"""DeepSpeed's C++ extensions, which torch compiles at the first use: a build that was killed blocks nobody.

Torch guards a build by a file that is made at its begin and removed at its end. A process that is killed between
leaves it, and every later start waits for it without end or word. Here a lock that dies with its process is held
around the build, and a note beside it says which extension is being built: whoever gets the lock and finds a note
knows that its writer is dead.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

NOTE = "glora_llm.building"
LOCK = "glora_llm.lock"
ABANDONED_SECONDS = 1800.0  # builds take a few minutes; an older file of another program's has no owner


def load_extension(builder_name: str) -> None:
    """Compile (once a machine) and load one of DeepSpeed's extensions, one process at a time.

    Args:
        builder_name: class name of DeepSpeed's builder, such as `CPUAdamBuilder`. Nothing happens where this
            accelerator has none, or the machine cannot compile it.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from filelock import FileLock

    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    root = extensions_root()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / LOCK):
        for left in abandoned(root):
            left.unlink(missing_ok=True)
            print(f"{left} was left by a build that was killed; it is removed, and the build starts again", flush=True)
        note = root / NOTE
        note.write_text(builder.name, encoding="utf-8")
        builder.load()
        note.unlink()


def leave_out_shared_buffers() -> None:
    """Keep DeepSpeed from compiling and opening its shared memory between CPU processes, which only its inference uses.

    Nobody removes those buffers, 66 MiB of memory a process in /dev/shm: each launch with a port of its own would take
    that much of the machine until it is booted again (DeepSpeed 0.19, csrc/cpu/comm/shm.cpp: nothing calls
    `shared_close`).
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def extensions_root() -> Path:
    """Return the folder that torch builds extensions below: the virtual environment's own, unless the user chose one.

    An extension is compiled against the headers of one environment. Two that share torch's folder in the home
    directory compile again at every change between them, and overwrite what the other has loaded.
    """
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        from torch.utils.cpp_extension import get_default_build_root

        if sys.prefix == sys.base_prefix or not os.access(sys.prefix, os.W_OK):
            return Path(get_default_build_root())
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def abandoned(root: Path, older_than: float = ABANDONED_SECONDS) -> Iterator[Path]:
    """Yield torch's files of builds whose process is gone; the caller holds the lock.

    Args:
        older_than: seconds after which a file that no note explains has no owner either.
    """
    note = root / NOTE
    ours = note.read_text(encoding="utf-8") if note.exists() else None
    for file in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        try:
            age = time.time() - file.stat().st_mtime
        except FileNotFoundError:  # its build has just ended
            continue
        if file.parent.name == ours or age > older_than:
            yield file
