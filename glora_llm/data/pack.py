"""Several samples in one row."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from glora_llm.errors import UserError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of sample numbers, each row at most `capacity` tokens long: best-fit decreasing.

    The longest sample comes first, and each goes to the fullest row that still has room. Equal lengths keep their
    order, so the rows depend on `lengths` and `capacity` alone.

    Raises:
        UserError: when a sample is longer than `capacity`.
    """
    if max(lengths, default=0) > capacity:
        raise UserError(f"A sample of {max(lengths)} tokens does not fit in a row of data.max_tokens={capacity}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free room -> rows that have it
    rooms: list[int] = []  # keys of open_rows, ascending
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        place = bisect_left(rooms, lengths[number])
        if place == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, capacity
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        rows[row].append(number)
        left = room - lengths[number]
        if left not in open_rows:
            open_rows[left] = []
            insort(rooms, left)
        open_rows[left].append(row)
    return rows
