"""launches.jsonl: with what each launch of a run trained, so that a report can say how to get its result again."""

import json
import time

from glora_llm.launch.launcher import Launcher
from glora_llm.launch.machine import commit, hardware, versions
from glora_llm.launch.ranks import Processes
from glora_llm.launch.stop import StopRequest
from glora_llm.plan.run_folder import LAUNCHES, RunFolder
from glora_llm.run.saving import write_for_people


def note_launch(folder: RunFolder, processes: Processes, start: int, stop: StopRequest | None) -> None:
    """Add a line to launches.jsonl: when, from which step, by which command and on what this launch begins to train.

    Args:
        start: optimizer steps that earlier launches have done.
        stop: knows the command already; None: it is looked up.
    """
    noted = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "from_step": start,
        "processes": processes.world_size,
        "command": (stop.launcher if stop else Launcher()).command,
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(processes.device.type),
    }
    lines = [json.dumps(line) + "\n" for line in [*folder.launches(), noted]]
    write_for_people(folder.path / LAUNCHES, "".join(lines))
