"""data.source, data.validation and data.test -> rows: files, folders, hub data sets and the embedded one."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from glora_llm.data.bad_rows import BadRows
from glora_llm.data.hub_source import DATA_FOLDER, HubSource
from glora_llm.data.local_sources import EMBEDDED, EmbeddedSource, FileSource
from glora_llm.data.readers import READERS, suffix
from glora_llm.data.table import Table, join
from glora_llm.errors import UserError, nearest
from glora_llm.files.links import dangling
from glora_llm.schema import DataSection

Role = str  # train, validation, test; test/NAME for each of several named test sets
SAME_SPLIT = (("train", "training"), ("validation", "valid", "val", "dev"))
# A data set of the hub, and its split, or its configuration and split; no split has a slash in its name.
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


class Source(Protocol):
    """A place that rows are read from."""

    def fingerprint(self) -> str:
        """Return a text that changes when the content changes."""
        ...

    def read(self, bad: BadRows | None = None) -> Table:
        """Return the rows; records that cannot be read go to `bad`, or are an error where it is None."""
        ...


Locate = Callable[[str, str | None, str], Source]  # name, subset, split


@dataclass(frozen=True)
class Sources:
    """Several sources that are read as one."""

    parts: tuple[Source, ...]

    def fingerprint(self) -> str:
        """Return a SHA-256 over the fingerprints of the parts, in hexadecimal."""
        return hashlib.sha256("\0".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def read(self, bad: BadRows | None = None) -> Table:
        """Return the rows of all parts.

        Raises:
            UserError: when a part cannot be read or holds no row, or two name their class numbers differently.
        """
        return join((str(part), part.read(bad)) for part in self.parts)


def _candidates(name: str) -> list[Path]:
    path = Path(name).expanduser()
    folder = os.environ.get(DATA_FOLDER)
    return [path] if path.is_absolute() or not folder else [path, Path(folder).expanduser() / path]


def find_path(name: str) -> Path | None:
    """Return the file or folder `name`, relative paths also below the folder GLORA_DATA; none when there is none."""
    return next((candidate for candidate in _candidates(name) if candidate.exists()), None)


def _looks_like_file(name: str) -> bool:
    if suffix(name) in READERS or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        return True
    return suffix(name)[1:].isalpha() and Path(name).parent.is_dir()  # table.xlsx is nobody's data set on the hub


def _folder_files(folder: Path, split: str, documents: bool) -> FileSource:
    stems = next((names for names in SAME_SPLIT if split in names), (split,))
    pattern = re.compile(rf"({'|'.join(map(re.escape, stems))})(-\d+(-of-\d+)?)?\.[a-z]+", re.IGNORECASE)
    there = sorted(f for f in folder.iterdir() if f.is_file() and suffix(f.name) in READERS)
    files = [f for f in there if pattern.fullmatch(f.name)]
    if not files:
        raise UserError(
            f"Folder {folder} has no file for split '{split}': expected {' or '.join(stems)} with one of the endings "
            f"{', '.join(READERS)}; there is: {', '.join(f.name for f in there) or 'no such file'}. "
            "Rename it, or name the file itself."
        )
    are_shards = all("-" in f.stem for f in files) and len({suffix(f.name) for f in files}) == 1
    if len(files) > 1 and not are_shards:
        raise UserError(
            f"Folder {folder} has several files for split '{split}': {', '.join(f.name for f in files)}; "
            "name the ones you want: data.source=[FILE,FILE]"
        )
    return FileSource(tuple(files), documents)


def locate(name: str, subset: str | None, split: str, documents: bool = False) -> Source:
    """Return the source called `name`: `embedded:NAME`, a file, a folder or, if there is none, a hub data set.

    Args:
        subset: configuration of a hub data set.
        split: split of a folder, a hub data set or an embedded one; a file has none.
        documents: read plain text in long pieces instead of line by line.

    Raises:
        UserError: when there is no such file, embedded data set, or file of that split.
    """
    if name.startswith("embedded:"):
        wanted = name.removeprefix("embedded:")
        if wanted not in EMBEDDED:
            raise UserError(
                f"Unknown embedded data set '{wanted}'; there is: {', '.join(EMBEDDED)}.{nearest(wanted, EMBEDDED)}"
            )
        if split not in EMBEDDED[wanted]:
            raise UserError(
                f"embedded:{wanted} has no split '{split}'; there is: {', '.join(EMBEDDED[wanted])}."
                f"{nearest(split, EMBEDDED[wanted])}"
            )
        return EmbeddedSource(wanted, split, documents)
    path = find_path(name)
    if path is None and _looks_like_file(name):
        raise UserError(_missing(name))
    if path is None:
        return HubSource(name, subset, split)
    if path.is_dir():
        return _folder_files(path, split, documents)
    if not path.is_file():  # a pipe would wait for its writer
        raise UserError(f"{path} is neither a file nor a folder; write what it gives into a file.")
    if suffix(path.name) not in READERS:
        raise UserError(f"Cannot read {path}: its ending should be one of {', '.join(READERS)}")
    return FileSource((path,), documents)


def _missing(name: str) -> str:
    looked = _candidates(name)
    link = next(filter(None, map(dangling, looked)), "")
    if link:
        return f"There is no file {name}.{link}"
    beside = [file.name for path in looked if path.parent.is_dir() for file in path.parent.iterdir()]
    is_alone = len(looked) == 1 and not looked[0].is_absolute()
    hint = f" Set {DATA_FOLDER} to the folder that relative paths start from." if is_alone else ""
    return f"There is no file {' or '.join(map(str, looked))}.{nearest(looked[0].name, beside)}{hint}"


def names_of(source: str | Sequence[str]) -> list[str]:
    """Return data.source as a list."""
    return [source] if isinstance(source, str) else list(source)


def locate_training(settings: DataSection, locate_one: Locate = locate) -> Sources:
    """Return the sources that data.source and data.split name.

    Args:
        locate_one: (name, subset, split) -> source, where it is not one of text.

    Raises:
        UserError: as `locate`; when data.source is an empty list.
    """
    names = names_of(settings.source)
    if not names:
        raise UserError("data.source is an empty list; name at least one file, folder or hub data set.")
    return Sources(tuple(_pinned(locate_one(name, settings.subset, settings.split), settings) for name in names))


def _pinned(source: Source, settings: DataSection) -> Source:
    """Return a source; one of the hub at the revision that the recipe gives."""
    revision = (settings.revisions or {}).get(source.name) if isinstance(source, HubSource) else None
    return replace(source, revision=revision) if isinstance(source, HubSource) and revision else source


def commits_of(sources: Iterable[Sources]) -> dict[str, str]:
    """Return hub data set -> commit that was loaded; a run goes on with these."""
    loaded = [part for one in sources for part in one.parts if isinstance(part, HubSource)]
    return {source.name: commit for source in loaded if (commit := source.commit())}


def locate_held_out(settings: DataSection, role: str, name: str, locate_one: Locate = locate) -> Sources:
    """Return the sources that data.validation or data.test names.

    That is a file, a folder, a hub data set (`owner/name`, `owner/name:split` or `owner/name:subset:split`), or else a
    split of data.source.

    Args:
        role: `validation` or `test`; also the split that is read of a folder named here.

    Raises:
        UserError: when it is neither, or the split that is trained on.
    """
    is_file = _looks_like_file(name) or name.startswith("embedded:")
    plain = [n for n in names_of(settings.source) if (found := find_path(n)) is not None and found.is_file()]
    if is_file or (("/" in name or plain) and find_path(name) is not None):
        return Sources((_pinned(locate_one(name, settings.subset, role), settings),))
    if HUB.fullmatch(name):
        place, *rest = name.split(":")
        subset, split = rest[0] if len(rest) > 1 else None, rest[-1] if rest else role
        return Sources((_pinned(locate_one(place, subset, split), settings),))
    if plain:
        raise UserError(
            f"data.{role}: '{name}' is no file, and no split either: data.source is the file {plain[0]}, which has no "
            "splits. Give a file, a share (0.1) or a number of rows (200)."
        )
    if name == settings.split:
        raise UserError(f"data.{role}: split '{name}' is the one that is trained on (data.split); name another.")
    return Sources(tuple(_pinned(locate_one(n, settings.subset, name), settings) for n in names_of(settings.source)))


def locate_roles(settings: DataSection, locate_one: Locate = locate) -> dict[Role, Sources]:
    """Return the sources of all roles that have one of their own; the others are drawn from the training rows.

    Raises:
        UserError: as `locate_training` and `locate_held_out`.
    """
    sources: dict[Role, Sources] = {"train": locate_training(settings, locate_one)}
    if isinstance(settings.validation, str):
        sources["validation"] = locate_held_out(settings, "validation", settings.validation, locate_one)
    for role, name in test_roles(settings).items():
        with named(role):
            sources[role] = locate_held_out(settings, "test", name, locate_one)
    return sources


def test_roles(settings: DataSection) -> dict[Role, str]:
    """Return the test sets that have a source of their own: role (`test`, or `test/NAME` of named ones) -> source."""
    if isinstance(settings.test, str):
        return {"test": settings.test}
    return {f"test/{name}": place for name, place in settings.test.items()} if isinstance(settings.test, dict) else {}


@contextlib.contextmanager
def named(role: Role) -> Iterator[None]:
    """Say in a UserError which of the named test sets it is about."""
    try:
        yield
    except UserError as error:
        if "/" not in role or str(error).startswith(role):
            raise
        raise UserError(f"data.test, {role.partition('/')[2]}: {error}") from error
