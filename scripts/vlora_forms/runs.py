"""Run what is missing of a comparison: each run in a process of its own, several at once, each on one thread."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.vlora_forms.forms import TWINS, Table

MODEL, BUDGET = "embedded:smollm2-135m-instruct", "0.5"
STOPPED = 75  # exit code of a run that was told to stop, and goes on when it is started again
Run = tuple[Path, list[str]]  # the folder of a run, and the command that trains it


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run that has ended with scores, else None."""
    file = folder / "summary.json"
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return summary if summary.get("test") or summary.get("validation") else None


def command(table: Table, form: str, seed: int, settings: list[str], twins: dict[str, list[str]]) -> list[str]:
    """Return the command of one run, without its folder.

    Args:
        settings: of all runs, behind those of the table.
        twins: name of a dense model of another size -> its sizes, which nothing else may change.
    """
    own = [*table.forms[form], *settings, *twins.get(form, []), f"training.seed={seed}"]
    if not table.shared:
        words = [MODEL, "--budget", BUDGET, "--data", table.files[0], "--steps", str(table.steps), "--distill"]
        return [sys.executable, "-m", "glora_llm", "vlora", "from-dense", *words, *table.common, *own]
    if form.startswith("dense"):
        return [sys.executable, "train.py", "--recipe", table.dense, *table.common, *own]
    return [sys.executable, "train.py", "--recipe", table.shared, *table.common, *table.paper, *own]


def run_all(runs: Iterable[Run], jobs: int) -> list[Path]:
    """Train what is not finished, `jobs` at a time; return the folders of runs that failed.

    The log of a run lies beside its folder. Told to end (Ctrl-C, SIGTERM), it passes that on and waits: runs write a
    checkpoint, and the same command goes on with them.
    """
    waiting = [run for run in runs if finished(run[0]) is None]
    going: dict[Path, subprocess.Popen[bytes]] = {}
    failed: list[Path] = []
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                folder, words = waiting.pop(0)
                print(f"{time.strftime('%H:%M:%S')} {folder} ({len(waiting)} more)", flush=True)
                going[folder] = _start(folder, words)
            time.sleep(1)
            for folder in [folder for folder, process in going.items() if process.poll() is not None]:
                code = going.pop(folder).returncode
                if code == STOPPED:
                    raise KeyboardInterrupt
                if code:
                    print(f"{folder} failed with exit code {code}: see {_log(folder)}", file=sys.stderr)
                    failed.append(folder)
    finally:
        for process in going.values():
            process.terminate()
        for process in going.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _log(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"


def _start(folder: Path, words: list[str]) -> "subprocess.Popen[bytes]":
    folder.parent.mkdir(parents=True, exist_ok=True)
    where = ["--out", str(folder)] if "from-dense" in words else [f"output.dir={folder}"]
    place = words.index("from-dense") + 1 if "from-dense" in words else len(words)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with _log(folder).open("ab") as log:
        return subprocess.Popen(
            [*words[:place], *where, *words[place:]], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def solve_twins(table: Table, changes: list[str], file: Path) -> dict[str, list[str]]:
    """Return name -> overrides of the dense models of other sizes, solved for once and kept in a file.

    Args:
        changes: further settings of all runs, which may be of the model.
        file: of a name that these settings tell from others.
    """
    if not table.shared:
        return {}
    if file.is_file():
        found: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
        return found
    from glora_llm import recipe as recipes
    from glora_llm.models.config_file import load_config
    from glora_llm.models.load import meta_model
    from glora_llm.plan.equal_bytes import overrides
    from glora_llm.plan.subjects import not_here, subject_here
    from glora_llm.plan.twin import count, find_twin

    checked = recipes.load(table.shared, [*table.common, *table.paper, *changes])
    folder, _ = subject_here(checked, 1, not_here(checked))
    config = load_config(folder)
    equal = sum(parameter.numel() for parameter in meta_model(checked.model, folder).parameters())
    wanted = {"equal": equal, "middle": round((equal * count(config)) ** 0.5)}
    found = {name: overrides(checked, find_twin(config, wanted[size], by)) for name, (by, size) in TWINS.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found
