"""The tasks of lm-eval by name: those that it ships, and YAML files in a folder of the user's own."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError, nearest

INSTALL = "pip install 'glora-llm[eval]' (or pip install 'lm-eval[hf]')"


def require_lm_eval() -> None:
    """Check that lm-eval is installed, and keep what it logs to errors.

    Raises:
        UserError: with the command that installs it.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UserError(f"--tasks is scored by lm-eval, which is not installed ({error}): {INSTALL}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load_tasks(names: Sequence[str], folder: Path | None = None) -> list[Any]:
    """Return tasks and groups of tasks of lm-eval with their data, which may be fetched from the hub.

    Args:
        names: of tasks, groups or tags.
        folder: of the user's YAML files, which win over tasks that lm-eval ships under the same name.

    Raises:
        UserError: for a name that is not known (with the nearest), data that cannot be read or fetched, and tasks that
            need more than a language model.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not any(folder.rglob("*.yaml")):
        raise UserError(f"--task-folder {folder} holds no YAML file of a task: expected one such as mine.yaml.")
    # lm-eval ships 15,000 names, and takes many seconds to read them: not where the folder has all that are asked for
    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder is not None else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.task_index:
            raise UserError(_unknown(name, manager.all_tasks, folder))
    return [made for name in names for made in _load(manager, name)]


def _load(manager: Any, name: str) -> list[Any]:
    """Return a task, the group or the tasks behind a name, with their data."""
    from datasets.exceptions import DatasetsError

    try:
        loaded = manager.load([name])
    except (OSError, DatasetsError) as error:  # ConnectionError, and a file that is not there, too
        raise UserError(_without_data(name, error)) from error
    except (ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--tasks {name}: lm-eval cannot make this task ({type(error).__name__}: {why}). Look into its YAML file."
        ) from error
    for task in loaded["tasks"].values():
        _require_text(task)
    group = loaded.get("groups", {}).get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


def _require_text(task: Any) -> None:
    """Refuse a task that runs code, or shows images: scores of a text model mean nothing there, or are not safe."""
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"--tasks {name} runs code that the model writes, which is not done here: merge the model, and use "
            "lm-eval's own command line in a container (--confirm_run_unsafe_code)."
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--tasks {name} shows images to the model, and a language model takes text alone.")


def _unknown(name: str, known: Sequence[str], folder: Path | None) -> str:
    where = f"in {folder} or of those that lm-eval ships" if folder else "of those that lm-eval ships"
    return (
        f"--tasks: '{name}' is no task {where}.{nearest(name, known)} `lm-eval ls tasks` lists them; a folder of YAML "
        "tasks of your own is given by --task-folder."
    )


def _without_data(name: str, error: Exception) -> str:
    why = " ".join(str(error).split())
    return (
        f"--tasks {name}: its data cannot be read ({type(error).__name__}: {why}). A task that lm-eval ships has its "
        "data on the hub: it needs the network once, or a copy in the hub's cache (HF_HOME). Without either, give a "
        "task of your own with data files that are here: --task-folder (docs/evaluation.md)."
    )
