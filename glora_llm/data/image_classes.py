"""The classes of images: their names, and the number of each row's class."""

from typing import Any

from glora_llm.data.columns import Row, value
from glora_llm.data.sources import Role
from glora_llm.data.table import Table
from glora_llm.errors import UserError, nearest
from glora_llm.schema import DataSection

# the columns of hub data sets, in this order; CIFAR-100 has a coarse class beside the fine one
ROLES = {"image": ("image", "img"), "label": ("label", "labels", "fine_label")}

SUBSET = " A named test set may have fewer classes than the training images, and no others."


def cell(row: Row, role: str, settings: DataSection) -> Any:
    """Return the column of `row` that plays `role`: the one that data.columns names, else a usual one.

    Raises:
        UserError: when the row has no such column; the message lists those that it has.
    """
    usual = next((name for name in ROLES[role] if name in row), None)
    return row[usual] if usual and role not in (settings.columns or {}) else value(row, role, settings)


def class_names(settings: DataSection, train: Table) -> list[str]:
    """Return the names of the classes: data.labels, else those that the data state, else those of the training rows.

    Raises:
        UserError: when there is one class or none.
    """
    labels = [cell(row, "label", settings) for row in train.rows]
    names = settings.labels or _stated(train, settings)
    if names is None and all(isinstance(label, int) for label in labels):
        names = [str(number) for number in range(max(labels) + 1)]
    names = names or sorted({str(label) for label in labels})
    if len(names) < 2:
        raise UserError(
            f"The training images are all of one class ({', '.join(names)}): there is nothing to tell apart. Expected "
            "two classes or more; check data.source, and data.columns: {label: COLUMN}."
        )
    return list(names)


def _stated(table: Table, settings: DataSection) -> list[str] | None:
    """Return the names that a table states for its column of labels."""
    wanted = (settings.columns or {}).get("label")
    columns = [wanted] if wanted else ROLES["label"]
    return next((table.label_names[column] for column in columns if column in table.label_names), None)


def class_numbers(table: Table, settings: DataSection, names: list[str], role: Role) -> list[int]:
    """Return the class number of each row; words are looked up among `names`.

    Raises:
        UserError: for a row whose label is no class, with its number.
    """
    own = _stated(table, settings) or names
    numbers = []
    for place, row in enumerate(table.rows, 1):
        label = cell(row, "label", settings)
        word = own[label] if isinstance(label, int) and 0 <= label < len(own) and settings.labels is None else label
        number = label if isinstance(word, int) else names.index(str(word)) if str(word) in names else -1
        if not 0 <= number < len(names):
            called = f"{label!r} ({word})" if word != label else repr(label)
            raise UserError(
                f"{role} row {place}: label {called} is none of the {len(names)} classes ({', '.join(names[:8])}"
                f"{', ...' if len(names) > 8 else ''}): expected 0 to {len(names) - 1}, or a name."
                f"{nearest(str(word), names)}{SUBSET if '/' in role else ''}"
            )
        numbers.append(number)
    return numbers
