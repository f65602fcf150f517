"""The numbers that a launcher gives its processes by environment variables, read before any process group exists."""

import os

from glora_llm.errors import UserError

ACCELERATORS = ("cpu", "cuda")


def planned_world_size() -> int:
    """Return the number of processes of this launch.

    Raises:
        UserError: when WORLD_SIZE or RANK is no number that a launcher would give.
    """
    world_size = _number("WORLD_SIZE", 1, least=1)
    process_rank = _number("RANK", 0, least=0)
    if process_rank >= world_size:
        raise UserError(
            f"The environment says RANK={process_rank} of WORLD_SIZE={world_size} processes; ranks begin at 0. Start "
            "the processes by a launcher (deepspeed, torchrun), or unset both variables."
        )
    _require_launch()
    return world_size


def planned_process_rank() -> int:
    """Return this process's number.

    Raises:
        UserError: as `planned_world_size`.
    """
    planned_world_size()
    return _number("RANK", 0, least=0)


def _require_launch() -> None:
    """Check that RANK has company, that the port is one, and that the accelerator is one of those used here.

    Raises:
        UserError: naming the variable.
    """
    accelerator = os.environ.get("DS_ACCELERATOR", "cpu")
    if accelerator not in ACCELERATORS:
        raise UserError(f"DS_ACCELERATOR is '{accelerator}'; expected {' or '.join(ACCELERATORS)}, or unset it.")
    if "RANK" not in os.environ:
        return
    lacking = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if lacking:
        raise UserError(
            f"RANK is set, and {', '.join(lacking)} not: a launcher (deepspeed, torchrun) sets them all. For one "
            "process, unset RANK."
        )
    port = os.environ["MASTER_PORT"]
    if not port.isascii() or not port.isdecimal() or not 0 < int(port[:6]) < 2**16:
        raise UserError(f"MASTER_PORT is '{port}'; expected the number of a free TCP port, 1 to 65535.")


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise UserError(
            f"The environment variable {name} is '{text}'; expected a number from {least} on. A launcher sets it "
            "(deepspeed, torchrun); for one process, unset it."
        )
    return int(text)
