"""Experiment trackers beside TensorBoard: wandb and trackio, where the recipe asks for them (`output.trackers`).

A tracker is a courtesy: whatever fails in it is said once, and training goes on without it.
"""

import importlib
import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glora_llm.atomic import write_text
from glora_llm.errors import UserError

IDS = "trackers.json"  # in the run folder: tracker -> the name of this run there, by which a later launch goes on
PROJECT = "glora-llm"


def require_trackers(names: Iterable[str]) -> None:
    """Check that the packages of trackers are installed; they are not imported.

    Raises:
        UserError: with the command that installs what is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"output.trackers: {' and '.join(missing)} not installed: pip install {' '.join(missing)}; or leave "
            "output.trackers out: TensorBoard and metrics.jsonl have every number."
        )


class Tracker:
    """One tracker of a run, which gives up for good at its first failure.

    Args:
        name: `wandb` or `trackio`.
        folder: of the run.
        settings: by which runs are compared.
        say: prints a line.

    Attributes:
        run: the tracker's own object; None when it has failed, or is closed.
    """

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]):
        self.name, self.say = name, say
        self.run: Any = None
        self._try(lambda: self._begin(folder, dict(settings)))

    def _begin(self, folder: Path, settings: dict[str, Any]) -> None:
        library, known = importlib.import_module(self.name), run_name(folder, self.name)
        if self.name == "wandb":
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            quiet = library.Settings(silent=True, console="off")
            self.run = library.init(
                project=project, name=folder.name, id=known, resume="allow", dir=folder, config=settings, settings=quiet
            )
            # steps of a killed launch come twice: wandb drops what goes back in its own count of steps
            self.run.define_metric("*", step_metric="step")
            self.say(f"wandb: {self.run.url or self.run.dir}")
            return
        self.run = library.init(
            project=PROJECT, name=known, config=settings, resume="allow", auto_log_gpu=False, auto_log_cpu=False
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers after `step` optimizer steps."""
        if self.run is None:
            return
        if self.name == "wandb":
            self._try(lambda: self.run.log({"step": step, **values}))
        else:
            self._try(lambda: self.run.log(dict(values), step=step))

    def close(self) -> None:
        """Let it send what waits."""
        if self.run is not None:
            self._try(self.run.finish)
        self.run = None

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on
            self.run = None
            text = " ".join(str(error).split())[:300]
            self.say(
                f"warning: {self.name} failed ({type(error).__name__}: {text}); training goes on without it. "
                "TensorBoard and metrics.jsonl have every number."
            )


def run_name(folder: Path, tracker: str) -> str:
    """Return the name of a run in a tracker, which the first launch makes up and notes in the run folder."""
    file = folder / IDS
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if tracker not in known:
        known[tracker] = f"{folder.absolute().name[:40]}-{secrets.token_hex(4)}"
        write_text(file, json.dumps(known, indent=1) + "\n")
    return known[tracker]


def open_trackers(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]
) -> list[Tracker]:
    """Return the trackers of a run; the main process calls this."""
    return [Tracker(name, folder, settings, say) for name in names]
