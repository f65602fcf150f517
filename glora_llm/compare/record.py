"""comparison.json: all settings, every trial with its scores, and the rows of the table; whole or absent."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from glora_llm.atomic import write_text
from glora_llm.errors import UserError
from glora_llm.files.json_file import read_object

NAME = "comparison.json"
RECIPE = "recipe.yaml"
LOG = "compare.log"
BOUND = ("recipe", "budget", "forgetting", "base", "data")


class Record:
    """The file of a comparison, which several threads add to.

    Args:
        folder: of the comparison.
        settings: what the comparison is.

    Attributes:
        trials: name -> what is known of it.
        seconds: of all launches of the command; `starting`: until trials can begin; `with_trials`: while any ran.
        speeds: method -> measured seconds a step, of a comparison at equal time.
        table: what a report draws, once there is something.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.trials: dict[str, dict[str, Any]] = {}
        self.speeds: dict[str, float] = {}
        self.table: dict[str, Any] = {}
        self.seconds = {"total": 0.0, "starting": 0.0, "with_trials": 0.0}
        self.lock = threading.RLock()
        there = read(folder)
        if there:
            _require_same(folder, there["settings"], settings)
            self.trials, self.speeds, self.seconds = there["trials"], there["speeds"], there["seconds"]

    def write(self) -> None:
        """Write the file."""
        with self.lock:
            content = self.table | {
                "settings": self.settings,
                "speeds": self.speeds,
                "seconds": self.seconds,
                "trials": self.trials,
                "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            write_text(self.folder / NAME, json.dumps(content, indent=1) + "\n")

    def note(self, name: str, **values: Any) -> None:
        """Add to what is known of a trial, and write the file."""
        with self.lock:
            self.trials[name] = self.trials.get(name, {}) | values
            self.write()


def read(folder: Path) -> dict[str, Any]:
    """Return the content of comparison.json; nothing where there is none.

    Raises:
        UserError: when the folder holds something else, or the file cannot be read.
    """
    file = folder / NAME
    advice = "Move the folder away, or choose another --out."
    if not file.is_file():
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file, and a folder is expected there. Choose another.")
        there = folder.iterdir() if folder.is_dir() else ()
        others = sorted(path.name for path in there if not path.name.startswith("."))
        if others and set(others) - {RECIPE, "trials"}:
            raise UserError(f"--out {folder} holds no comparison, and is not empty: {', '.join(others[:3])}. {advice}")
        return {}
    found = read_object(file, advice)
    missing = [key for key in ("settings", "trials", "speeds", "seconds") if not isinstance(found.get(key), dict)]
    if missing:
        raise UserError(f"{file} has no {missing[0]}. {advice}")
    return found


def _require_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Check that a folder holds a comparison of the same recipe at the same budget.

    Raises:
        UserError: naming what differs.
    """
    differing = [key for key in BOUND if there.get(key) != here.get(key)]
    if not differing:
        return
    names = {
        "recipe": "the recipe, or an override of it",
        "budget": f"the budget ({there.get('budget')} there, {here.get('budget')} here)",
        "forgetting": "--forgetting",
        "base": "the base model",
        "data": "the rows of the data",
    }
    raise UserError(
        f"{folder} holds another comparison: {', '.join(names[key] for key in differing)} differs. Choose another "
        "--out. Methods, rates and seeds may change: finished trials are used again."
    )
