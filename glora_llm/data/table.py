"""The rows of a file or data set, where each stands, and the names of class numbers."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from glora_llm.data.columns import Row
from glora_llm.errors import UserError


@dataclass
class Table:
    """Rows, their places, and the names of class numbers by column, where the file or data set states them.

    Attributes:
        places: file and line of each row, or file and row, for messages.
    """

    rows: list[Row]
    label_names: dict[str, list[str]] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)

    def add(self, row: Row, place: str) -> None:
        """Append a row."""
        self.rows.append(row)
        self.places.append(place)


def join(tables: Iterable[tuple[str, Table]]) -> Table:
    """Return one table of all rows.

    Args:
        tables: where each table comes from, and the table.

    Raises:
        UserError: when one is empty, or two name the class numbers of one column differently.
    """
    joined = Table([])
    for origin, table in tables:
        if not table.rows:
            raise UserError(f"{origin} holds no rows.")
        for column, names in table.label_names.items():
            if joined.label_names.setdefault(column, names) != names:
                raise UserError(
                    f"{origin} numbers the classes of column '{column}' differently from the one before it."
                )
        joined.rows += table.rows
        joined.places += table.places
    return joined
