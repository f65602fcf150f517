"""launches.jsonl: what a report says about how a run was made."""

import re
import shutil
from pathlib import Path

import torch

from glora_llm import __version__
from glora_llm.launch import machine
from glora_llm.launch.ranks import Processes
from glora_llm.plan.run_folder import LAUNCHES, RunFolder
from glora_llm.run.launches import note_launch


def test_every_launch_adds_a_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.launches() == []
    note_launch(folder, Processes(0, 2, torch.device("cpu")), 0, None)
    note_launch(folder, Processes(0, 1, torch.device("cpu")), 30, None)
    first, second = folder.launches()
    assert (first["from_step"], first["processes"]) == (0, 2) and (second["from_step"], second["processes"]) == (30, 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["started"]) and first["command"]
    assert first["versions"]["torch"] == torch.__version__ and first["versions"]["glora_llm"] == __version__
    assert first["hardware"]["cores"] >= 1 and first["hardware"]["gpus"] == []


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / LAUNCHES).write_bytes(b'{"from_step": 0}\n{"from_st\xff\n[]\n{"from_step": 7}\n')
    assert [launch["from_step"] for launch in folder.launches()] == [0, 7]


def test_the_commit_is_that_of_the_packages_own_checkout() -> None:
    found = machine.commit()
    if (Path(machine.__file__).parents[2] / ".git").exists() and shutil.which("git"):
        assert found is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found)
    else:
        assert found is None
