"""`glora-llm watch`: TensorBoard for one run or a folder of runs."""

import argparse
import threading
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError

WATCH = """\
Show a run, or all runs of a folder beside each other, in TensorBoard on this machine, and print its
address.

examples:
  glora-llm watch runs/quickstart
  glora-llm watch runs --port 6007

It listens on localhost alone: from elsewhere, forward the port (ssh -L 6006:localhost:6006
MACHINE). Ctrl-C ends it."""


def add_command(commands: Any, style: Any) -> None:
    """Add `watch` to the parser of `glora-llm`."""
    command = commands.add_parser("watch", help="show curves in a browser", description=WATCH, formatter_class=style)
    command.add_argument("run", metavar="RUN", type=Path, help="a run folder, or a folder of run folders")
    command.add_argument("--port", metavar="N", type=int, help="default: 6006, or the next one that is free")
    command.set_defaults(command=watch)


def watch(arguments: argparse.Namespace) -> int:
    """Run `glora-llm watch`: start TensorBoard, print its address, and wait for Ctrl-C."""
    print(f"{start_tensorboard(arguments.run, arguments.port)}    (Ctrl-C ends it)", flush=True)
    threading.Event().wait()
    return 0


def start_tensorboard(run: Path, port: int | None) -> str:
    """Serve the logs below `run` in a thread of this process, and return the address of the page to open first.

    Args:
        port: to listen at; None: 6006, or the next one that is free.

    Raises:
        UserError: when there is no log below the folder, or the port is taken.
    """
    if next(run.rglob("events.out.tfevents.*"), None) is None:
        raise UserError(f"{run} has no TensorBoard log. Give the output.dir of a run that has begun, or its parent.")
    from tensorboard import program

    chosen = [] if port is None else ["--port", str(port)]
    server = program.TensorBoard()
    server.configure(["tensorboard", "--logdir", str(run), "--host", "localhost", "--load_fast=false", *chosen])
    try:
        return f"{server.launch()}#custom_scalars"
    except program.TensorBoardServerException as error:
        raise UserError(f"TensorBoard cannot listen at port {port}: {error} Choose another by --port.") from error
