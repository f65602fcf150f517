"""The journal of all scores, which survives a kill, and the exact Pareto front of score against parameters."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.atomic import write_text
from glora_llm.errors import UserError
from glora_llm.failpoints import reach
from glora_llm.search.space import Code

SLOPE_SAMPLES = 3  # forward passes that one row of slopes (a forward and a backward pass) counts as


class Scored(NamedTuple):
    """One candidate that was scored on all rows."""

    code: Code
    score: float
    parameters: int
    cost: float
    generation: int


def pareto_front(candidates: Sequence[Scored]) -> list[Scored]:
    """Return the candidates that no other one beats in both score and parameters, smallest first."""
    front: list[Scored] = []
    for candidate in sorted(candidates, key=lambda c: (c.parameters, -c.score, c.code.tobytes())):
        if not front or candidate.score > front[-1].score:
            front.append(candidate)
    return front


def best(candidates: Sequence[Scored]) -> Scored:
    """Return the candidate of the highest score; the smaller one of two alike."""
    return min(candidates, key=lambda c: (-c.score, c.parameters, c.code.tobytes()))


class Journal:
    """Scores of (genome, row), each scored once; appended to a file after every candidate.

    Args:
        file: `journal.jsonl`; None keeps all in memory.
        identity: names all that the scores depend on (supernet, rows, metric); the file's first line.
        rows: number of rows.
        lines: the file's lines, as `read` returned them (the first process reads and tells the others).

    Raises:
        UserError: when the file belongs to another supernet, other rows or another metric.
    """

    def __init__(self, file: Path | None, identity: dict[str, Any], rows: int, lines: Sequence[str] = ()):
        self.file, self.rows = file, rows
        self.values: dict[bytes, NDArray[np.float64]] = {}
        self._slopes: dict[tuple[bytes, bytes], NDArray[np.float64]] = {}  # by the bytes of code and rows
        self.samples = 0
        entries = list(_whole_lines(lines))
        if entries and entries[0] != identity:
            differing = sorted(k for k in identity if entries[0].get(k) != identity[k])
            raise UserError(
                f"{file} was scored with different {', '.join(differing)}. Delete {file.parent if file else file} to "
                "search anew, or put back what was changed."
            )
        for entry in entries[1:]:
            keep = self._keep_slopes if "slopes" in entry else self._keep
            values = np.array(entry["slopes" if "slopes" in entry else "values"])
            keep(bytes.fromhex(entry["code"]), np.array(entry["rows"]), values)
        if file is not None:
            kept = entries or [identity]
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(json.dumps(entry) + "\n" for entry in kept))  # no last line that was cut off

    @staticmethod
    def read(file: Path) -> list[str]:
        """Return the lines of a journal, none where there is no file."""
        return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []

    def missing(self, code: Code, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of `rows` that have no score of this genome yet."""
        known = self.values.get(code.tobytes())
        return rows if known is None else rows[np.isnan(known[rows])]

    def record(self, code: Code, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Keep the scores of some rows, on disk too."""
        self._keep(code.tobytes(), rows, values)
        reach("search.before_journal")
        self._append({"code": code.tobytes().hex(), "rows": rows.tolist(), "values": values.tolist()})
        reach("search.after_journal")

    def record_slopes(self, code: Code, rows: NDArray[np.int64], slopes: NDArray[np.float64]) -> None:
        """Keep the slopes of a genome over some rows, on disk too; they count as SLOPE_SAMPLES of each row."""
        self._keep_slopes(code.tobytes(), rows, slopes)
        self._append({"code": code.tobytes().hex(), "rows": rows.tolist(), "slopes": slopes.tolist()})

    def slopes_of(self, code: Code, rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """Return slopes that are known, or None."""
        return self._slopes.get((code.tobytes(), rows.tobytes()))

    def mean_slopes(self) -> NDArray[np.float64] | None:
        """Return the mean of all slopes that are known, or None."""
        return np.mean(list(self._slopes.values()), axis=0) if self._slopes else None

    def _append(self, entry: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(entry) + "\n")
                out.flush()
                os.fsync(out.fileno())

    def _keep_slopes(self, key: bytes, rows: NDArray[np.int64], slopes: NDArray[np.float64]) -> None:
        self._slopes[key, rows.tobytes()] = slopes
        self.samples += SLOPE_SAMPLES * len(rows)

    def _keep(self, key: bytes, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        self.values.setdefault(key, np.full(self.rows, np.nan))[rows] = values
        self.samples += len(rows)

    def get(self, code: Code, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return scores that are known, (rows)."""
        return self.values[code.tobytes()][rows]

    def score(self, code: Code) -> float | None:
        """Return the mean over all rows, or None where not all are scored."""
        known = self.values.get(code.tobytes())
        return None if known is None or np.isnan(known).any() else float(known.mean())


def _whole_lines(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the entries that were written in full: a kill may cut the last line off."""
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
