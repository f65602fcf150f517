"""Merge a run with an adapter and one that was trained as a whole; print the peak of memory of each, in bytes.

Arguments: the folder of each run, then the folder to write into. Linux keeps the largest resident size of a process
(VmHWM) and forgets it when 5 is written to clear_refs.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from glora_llm.merge.command import merge_run


def resident(field: str) -> int:
    """Return VmHWM or VmRSS of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    runs, out = [Path(text) for text in sys.argv[1:-1]], Path(sys.argv[-1])
    peaks = {}
    for run in runs:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        merge_run(run, out / run.name)
        peaks[run.name] = resident("VmHWM") - before
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
