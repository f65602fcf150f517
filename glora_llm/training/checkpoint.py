"""Checkpoints that are complete or absent, hold no pickle and fit any number of processes.

`checkpoints/step-N/` holds state.safetensors (float32 master weights and Adam moments by parameter name), adapter/
(ready for PEFT; not of a model that is trained as a whole), trainer.json (step, samples, seeds, identity of recipe and
base) and manifest.json (size and sha256 of every file, written last). A checkpoint is written as `.writing-step-N`,
synced, then renamed: it is there whole or not at all. The newest complete one wins; a broken one is named and passed
over.
"""

import contextlib
import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glora_llm.atomic import whole_folder
from glora_llm.errors import UserError
from glora_llm.failpoints import reach
from glora_llm.files.json_file import read_object

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
SMALL_FILES = 200_000  # bytes: names and shapes in the safetensors headers, the JSON files, folders
TRAINER = "trainer.json"
NEEDED = frozenset({"state.safetensors", TRAINER})
TRAINER_VALUES = {
    "step": int,
    "seconds": int | float,
    "applied": int,
    "data_digest": str,
}  # without which nothing goes on


def step_of(folder: Path) -> int:
    """Return N of `step-N`, or -1 for another name."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match[1]) if match else -1


def checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders below `root`, newest first, whether complete or not."""
    found = [folder for folder in root.glob("step-*") if folder.is_dir() and step_of(folder) >= 0]
    return sorted(found, key=step_of, reverse=True)


def write(
    root: Path,
    step: int,
    tensors: dict[str, Tensor],
    trainer: dict[str, Any],
    save_adapter: Callable[[Path], None] | None,
) -> Path:
    """Write `root/step-N` atomically (one process calls this).

    Args:
        tensors: what `Engine.state` yielded.
        trainer: plain values for trainer.json.
        save_adapter: writes the adapter into the folder it is given; None: there is none, the tensors are all.

    Raises:
        OSError: when the disk is full or not writable; older checkpoints are untouched.
    """
    final = root / f"step-{step}"
    with whole_folder(final) as folder:
        _save_tensors(tensors, save_adapter, folder)
        (folder / "trainer.json").write_text(json.dumps(trainer, indent=1), encoding="utf-8")
        reach("checkpoint.after_trainer")
        write_manifest(folder)
        reach("checkpoint.after_manifest")
    reach("checkpoint.after_write")
    return final


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of every file of a folder that is not published yet, by which `fault` judges it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _save_tensors(tensors: dict[str, Tensor], save_adapter: Callable[[Path], None] | None, folder: Path) -> None:
    """Write both safetensors files."""
    reach("checkpoint.before_tensors")
    with disk_errors(folder):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "state.safetensors")
        reach("checkpoint.after_tensors")
        if save_adapter is not None:
            save_adapter(folder / "adapter")
        reach("checkpoint.after_adapter")


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn the error by which safetensors tells of a full disk into an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from error


def fault(folder: Path, needed: Set[str] = NEEDED) -> str | None:
    """Return what is wrong with a folder that has a manifest, or None when it is whole.

    Args:
        needed: the files without which the manifest is none of such a folder; a checkpoint's by default.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if not _is_manifest(manifest, needed):
        return f"{MANIFEST} does not list {' and '.join(sorted(needed))}"
    for name, wanted in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {wanted['bytes']} were written"
        try:
            differs = _sha256(path) != wanted["sha256"]
        except OSError as error:  # a broken disk
            return f"{name} cannot be read ({error})"
        if differs:
            return f"{name} differs from what was written (sha256)"
    return _trainer_fault(folder / TRAINER) if TRAINER in needed else None


def _trainer_fault(file: Path) -> str | None:
    """Return what a run could not go on from in trainer.json, whatever its checksum says: it was changed by hand."""
    try:
        values = read_object(file, "")
    except UserError as error:
        return f"{TRAINER} {str(error).removeprefix(str(file)).strip()}"
    wrong = [key for key, kind in TRAINER_VALUES.items() if not isinstance(values.get(key), kind)]
    if wrong:
        return f"{TRAINER} has no {wrong[0]}, or one of another kind"
    named = step_of(file.parent)
    return None if values["step"] == named else f"{TRAINER} is of step {values['step']}, and the folder of step {named}"


def _is_manifest(manifest: Any, needed: Set[str]) -> bool:
    """Tell whether this is what `write_manifest` wrote, by its shape."""
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        return False
    stay = all(".." not in Path(name).parts and not Path(name).is_absolute() for name in manifest)
    return stay and all(isinstance(item, dict) and {"bytes", "sha256"} <= item.keys() for item in manifest.values())


def newest(root: Path) -> Path | None:
    """Return the newest complete checkpoint, naming every broken one that is passed over."""
    for folder in checkpoints(root):
        problem = fault(folder)
        if problem is None:
            return folder
        log.warning("passed over broken checkpoint %s: %s", folder, problem)
    return None


def read(folder: Path, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, trainer values) of a checkpoint.

    Raises:
        UserError: when its parameters are not those of this run.
    """
    tensors = load_file(folder / "state.safetensors")
    stored = {name.partition("/")[2] for name in tensors}
    if stored != set(names):
        absent, extra = sorted(set(names) - stored)[:3], sorted(stored - set(names))[:3]
        raise UserError(
            f"{folder} does not belong to this adapter: it lacks {absent or 'nothing'} and has {extra or 'nothing'} "
            "more. Use the recipe it was written with, or another output.dir."
        )
    return tensors, json.loads((folder / "trainer.json").read_text(encoding="utf-8"))


def rotate(root: Path, keep: int) -> None:
    """Delete what lies behind the `keep` newest whole checkpoints, and what an interrupted write left.

    Checkpoints count only after they have been read again and found whole: a good one never goes for a broken one. A
    checkpoint that one of those names as the best stays too.
    """
    for leftover in root.glob(".writing-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    whole, best = 0, set()
    found = checkpoints(root)
    for folder in found if len(found) > keep else ():
        if whole >= keep:
            if step_of(folder) not in best:
                _delete(folder)
        elif fault(folder) is None:
            whole += 1
            best.add(best_step(folder))


def best_step(folder: Path) -> int:
    """Return the step of the checkpoint that validated best when this whole one was written; 0: none is kept."""
    trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    return int(trainer.get("best", {}).get("kept", 0))


def _delete(folder: Path) -> None:
    reach("rotation.before_delete")
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink()  # from here on it is no checkpoint, whatever is left of it
    reach("rotation.in_delete")
    shutil.rmtree(folder, ignore_errors=True)
    reach("rotation.after_delete")


def require_resume(root: Path, resume: str) -> None:
    """Check output.resume before anything is written.

    Raises:
        UserError: for `never` where there are checkpoints, and for `must` where there are none.
    """
    there = checkpoints(root)
    if there and resume == "never":
        raise UserError(
            f"output.resume is never, and {there[0]} is there. Choose another output.dir, or output.resume=auto."
        )
    if not there and resume == "must":
        raise UserError(f"output.resume is must, and {root} has no checkpoint.")


def size(trained_numbers: int, has_adapter: bool) -> int:
    """Return the bytes of a checkpoint's tensors: master weights, two moments and the adapter, if any, in float32."""
    return 4 * (3 + has_adapter) * trained_numbers


def require_space(root: Path, each: int, keep: int) -> None:
    """Check that `keep` + 1 checkpoints (a new one is there before an old one goes) and the final weights fit.

    Args:
        each: bytes of one; the final weights take less.

    Raises:
        UserError: when fewer bytes are free than those that are not there yet need.
    """
    missing = max(1, keep + 1 - len(checkpoints(root)))
    needed, (existing, free) = (missing + 1) * (each + SMALL_FILES), _free(root)
    if free < needed:
        raise UserError(
            f"{existing} has {megabytes(free)} free; {missing} checkpoints (output.keep {keep}, and one that is being "
            f"written) and the final weights need {megabytes(needed)}. Free some space, lower output.keep, or choose "
            "another output.dir."
        )


def require_room(root: Path, each: int) -> None:
    """Check that one more checkpoint fits, before anything of it is written.

    Args:
        each: bytes of one.

    Raises:
        OSError: ENOSPC, with the numbers.
    """
    existing, free = _free(root)
    if free < each + SMALL_FILES:
        text = f"{existing} has {megabytes(free)} free, and {megabytes(each + SMALL_FILES)} are needed"
        raise OSError(errno.ENOSPC, text)


def _free(root: Path) -> tuple[Path, int]:
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    return existing, shutil.disk_usage(existing).free


def megabytes(count: int) -> str:
    """Return a number of bytes in MB, or in GB from 1 GB on."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
