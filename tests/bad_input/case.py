"""One wrong input: how it is made, and what has to come of it."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glora_llm.cli import main
from tests.in_process import LAUNCH
from tests.written_records import write_questions

RECIPE = """\
model: {name_or_path: "embedded:tiny-llama"}
adapter: {rank: 2, alpha: 4.0}
data: {format: prompt_completion, source: rows.jsonl, validation: 4, max_tokens: 64, overlong: drop}
training: {deepspeed: zero1, global_batch: 2, micro_batch: 1, steps: 3, lr: 1e-3}
output: {dir: run}
"""
TRAIN = ("train", "--recipe", "recipe.yaml", "--dry-run")
Change = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A wrong input, tried in a folder of its own.

    Args:
        says: part of the message; empty: the input is right, and is accepted.
        words: of the command behind `command`: overrides of the recipe.
        change: writes or damages files of the folder first.
        environment: variables that are set meanwhile.
        command: the command; a dry run of recipe.yaml where nothing else is said.
        code: the exit code that has to come.
    """

    says: str
    words: tuple[str, ...] = ()
    change: Change | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = TRAIN

    @property
    def code(self) -> int:
        """The exit code that has to come."""
        return 2 if self.says else 0


@dataclass(frozen=True)
class Outcome:
    """What came of a wrong input.

    Attributes:
        code: exit code; None: it ended with an exception, which a user sees as a traceback.
        said: standard error, or the exception.
        written: files that are new or changed.
    """

    code: int | None
    said: str
    written: tuple[str, ...]


def bad(says: str, *words: str, change: Change | None = None, **keys: Mapping[str, str] | tuple[str, ...]) -> Case:
    """Return a case; see `Case`."""
    return Case(says, words, change, **keys)  # type: ignore[arg-type]


def file(name: str, content: str | bytes) -> Change:
    """Return what writes a file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)

    return change


def both(*changes: Change) -> Change:
    """Return what makes several changes."""
    return lambda folder: [change(folder) for change in changes]


def prepare(folder: Path) -> None:
    """Write the recipe and its rows."""
    write_questions(folder / "rows.jsonl")
    (folder / "recipe.yaml").write_text(RECIPE)


def outcome(case: Case, folder: Path) -> Outcome:
    """Try a case in an empty folder."""
    prepare(folder)
    if case.change is not None:
        case.change(folder)
    before = _contents(folder)
    told = io.StringIO()
    with (
        working_in(folder, case.environment),
        contextlib.redirect_stderr(told),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            code: int | None = main([*case.command, *case.words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Exception as error:  # noqa: BLE001 - whatever a user would see
            code = None
            told.write(f"{type(error).__name__}: {error}")
    after = _contents(folder)
    written = tuple(sorted(name for name, size in after.items() if before.get(name) != size))
    said = told.getvalue().replace(f"{folder.resolve()}/", "").replace(str(folder.resolve()), ".")
    return Outcome(code, said, written)


@contextlib.contextmanager
def working_in(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Work in a folder, with variables set and no trace of a launch, neither before nor after."""
    before, cwd = dict(os.environ), Path.cwd()
    for name in LAUNCH:
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(before)


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


def copy_model(folder: Path) -> Path:
    """Copy the embedded LLaMA of two layers into `folder`/model."""
    from glora_llm.models.embedded import embedded_folder

    target = folder / "model"
    shutil.copytree(embedded_folder("tiny-llama"), target)
    return target
