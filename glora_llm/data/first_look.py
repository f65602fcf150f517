"""A first look at a recipe's data: paths, endings, columns and the first records of each file, without slow imports.

It decides only what the first records decide; `prepare` reads all of them and checks the same.
"""

import io
from dataclasses import dataclass
from functools import partial
from importlib.resources.abc import Traversable
from typing import IO

from glora_llm.data.bad_rows import BadRows
from glora_llm.data.columns import Row, check_columns
from glora_llm.data.formats import FORMATS, check_settings
from glora_llm.data.image_sources import locate_images
from glora_llm.data.images import check_image_settings
from glora_llm.data.label_words import readable
from glora_llm.data.local_sources import FileSource
from glora_llm.data.readers import READERS, class_names, numbered, read_file, read_separated, require_text, suffix
from glora_llm.data.sources import Role, Sources, locate, locate_roles
from glora_llm.data.table import Table
from glora_llm.errors import UserError
from glora_llm.schema import DataSection

FILES = 16  # of each source
RECORDS = 100  # of each file
BYTES = 1 << 20
SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass
class Look:
    """The first records of one source.

    Attributes:
        table: at most RECORDS of each file.
        is_whole: these are all records.
        has_all_columns: no later record has another column.
    """

    table: Table
    is_whole: bool = True
    has_all_columns: bool = True


def first_look(settings: DataSection) -> None:
    """Check the data section against what is there, in a fraction of a second.

    Raises:
        UserError: for an unknown format, a key that the format has no use for, a path that is not there, a file of
            another kind or without records, a column that is not there, and first records of which none can be used.
    """
    if settings.format == "images":
        check_image_settings(settings)
        locate_roles(settings, locate_images)
        return
    check_settings(settings)
    sources = locate_roles(settings, partial(locate, documents=settings.overlong == "split"))
    looks = {role: look for role, source in sources.items() if (look := _look(source)) is not None}
    if "train" in looks and looks["train"].has_all_columns:
        check_columns(looks["train"].table.rows, settings)
    if settings.format == "classification" and settings.labels is None:
        if len(looks) < len(sources):
            return  # a data set of the hub may state the names
        column = (settings.columns or {}).get("label", "label")
        stated = [look.table.label_names[column] for look in looks.values() if column in look.table.label_names]
        settings = settings.model_copy(update={"labels": [readable(name) for name in stated[0]] if stated else None})
    for role, look in looks.items():
        _require_one(role, look, settings)


def _require_one(role: Role, look: Look, settings: DataSection) -> None:
    """Check that one of the first records can be used, where that has to be so."""
    table, to_example = look.table, FORMATS.get(settings.format)
    if settings.bad_rows == "skip" and not look.is_whole:
        return
    found = BadRows(role if look.is_whole else f"first {role}", len(table.rows))
    for row, place in zip(table.rows, table.places, strict=True):
        with found.collecting(place):
            to_example(row, settings)
            return
    if table.rows:
        found.require_none(
            "None of them fits: look whether data.format, data.columns and "
            f"data.{'source' if role == 'train' else role} belong together."
        )


def _look(source: Sources) -> Look | None:
    """Return the first records of a source, or None where a part of it is no file.

    Raises:
        UserError: for a file without records, or that is not what its ending says.
    """
    whole = Look(Table([]))
    for part in source.parts:
        if not isinstance(part, FileSource):
            return None
        if len(part.files) > FILES:
            whole.is_whole = whole.has_all_columns = False
        for file in part.files[:FILES]:
            look = _look_into(file)
            whole.table.rows += look.table.rows
            whole.table.places += look.table.places
            whole.table.label_names |= look.table.label_names
            whole.is_whole &= look.is_whole
            whole.has_all_columns &= look.has_all_columns
    return whole


def _look_into(file: Traversable) -> Look:
    ending, bad = suffix(file.name), BadRows()
    try:
        with file.open("rb") as stream:
            require_text(stream, str(file), ending)
            if ending == ".parquet":
                look = _parquet(stream, str(file))
            elif ending in SEPARATORS:
                table = read_separated(stream, str(file), SEPARATORS[ending], bad, RECORDS)
                look = Look(table, is_whole=len(table.rows) + bad.count < RECORDS)
            else:
                look = _begin(stream, file, ending, bad)
    except UnicodeDecodeError:
        read_file(file)  # says which line it is
        raise
    if look.is_whole and not look.table.rows:
        bad.records = bad.count
        bad.require_none()
        raise UserError(f"{file} holds no rows.")
    return look


def _begin(stream: IO[bytes], file: Traversable, ending: str, bad: BadRows) -> Look:
    """Return the records of the first MiB; of a longer list in JSON none, as it can be read only as a whole."""
    content = stream.read(BYTES + 1)
    if len(content) <= BYTES:
        return Look(READERS[ending](io.BytesIO(content), str(file), bad))
    kept = b"" if ending == ".json" else content[: content.rfind(b"\n") + 1]
    table = READERS[".jsonl" if ending == ".json" else ending](io.BytesIO(kept), str(file), bad)
    return Look(table, is_whole=False, has_all_columns=False)


def _parquet(stream: IO[bytes], name: str) -> Look:
    """Return the first records of a parquet file; its last bytes name all columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(stream, mode="r"))
        rows: list[Row] = next((batch.to_pylist() for batch in file.iter_batches(RECORDS)), [])
        table = Table(rows, class_names(file.schema_arrow.metadata), numbered(rows, name))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a readable parquet file: {error}; download or write it again") from error
    return Look(table, is_whole=len(rows) == file.metadata.num_rows)
