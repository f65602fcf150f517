"""The numbers that a launcher gives its processes by environment variables, read before any process group exists."""

import os

from glora_llm.errors import UserError


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
    return world_size


def planned_process_rank() -> int:
    """Return this process's number.

    Raises:
        UserError: as `planned_world_size`.
    """
    planned_world_size()
    return _number("RANK", 0, least=0)


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise UserError(
            f"The environment variable {name} is '{text}'; expected a number from {least} on. A launcher sets it "
            "(deepspeed, torchrun); for one process, unset it."
        )
    return int(text)
