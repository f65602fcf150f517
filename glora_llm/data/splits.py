"""Training, validation and test examples: read from their own source, or drawn from the training rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from glora_llm.data.bad_rows import BadRows, require_usable
from glora_llm.data.formats import FORMATS, Example
from glora_llm.data.sampler import permutation
from glora_llm.data.shots import Classed, draw_shots
from glora_llm.data.sources import Role, test_roles
from glora_llm.data.table import Table
from glora_llm.errors import UserError, nearest
from glora_llm.schema import DataSection

# Streams of the seeded choices, so that changing one leaves the others as they are.
_DRAW = {"train": 11, "validation": 12, "test": 13}
_LIMIT = {"train": 21, "validation": 22, "test": 23}


E = TypeVar("E", bound=Classed)


@dataclass
class Split(Generic[E]):
    """The examples of one role.

    Attributes:
        rows_read: rows of its source, or drawn from the training rows; of train, without those drawn.
        empty: rows left out because what is to be learnt is blank.
        duplicates: training rows left out because a held-out row reads the same.
        also_in_train: held-out rows from a source of their own that read the same as a training row; kept.
        bad: the records of the source that cannot be used; drawn splits have those of the training rows.
    """

    role: Role
    examples: list[E] = field(default_factory=list)
    rows_read: int = 0
    empty: int = 0
    duplicates: int = 0
    also_in_train: int = 0
    bad: BadRows = field(default_factory=BadRows)


def to_split(role: Role, table: Table, settings: DataSection, bad: BadRows | None = None) -> Split[Example]:
    """Return the rows as examples; those whose answer is blank, and those that do not fit the format, are left out.

    Args:
        bad: the records that could not be read; those that do not fit are added.

    Raises:
        UserError: when no example is left.
    """
    to_example = FORMATS.get(settings.format)
    bad = bad or BadRows()
    bad.role, bad.records = role, len(table.rows) + bad.count
    split: Split[Example] = Split(role, rows_read=bad.records, bad=bad)
    for row, place in zip(table.rows, table.places, strict=True):
        with bad.collecting(place):
            example = to_example(row, settings)
            if any(target.strip() for target in example.targets()):
                split.examples.append(replace(example, origin=place))
            else:
                split.empty += 1
    if not split.examples:
        require_usable([bad], settings)
        raise UserError(
            f"The answers of all {split.empty} {role} rows are blank: there is nothing to learn or to score."
        )
    return split


def require_known_classes(splits: Mapping[Role, Split[Example]]) -> None:
    """Check that named test sets hold no class that the training rows have not; a class may be missing there.

    Raises:
        UserError: naming the test set and the class.
    """
    known = {example.class_name() for example in splits["train"].examples}
    for role, split in splits.items():
        new = sorted({example.class_name() for example in split.examples} - known) if "/" in role else []
        if new:
            raise UserError(
                f"data.test, {role.partition('/')[2]}: class '{new[0]}' is not among those of the training rows, so "
                f"nothing learns it.{nearest(new[0], known)} A test set may have fewer classes, and no others."
            )


def rows_wanted(wish: float | int, total: int, available: int, role: Role) -> int:
    """Return how many rows a share (0.1) of `total` rows, or a number (200), is.

    Args:
        total: rows before anything was held out.
        available: rows that can still be drawn.

    Raises:
        UserError: when that is none, or leaves none for training.
    """
    count = math.floor(wish * total + 0.5) if isinstance(wish, float) else wish
    if 0 < count < available:
        return count
    raise UserError(
        f"data.{role}={wish} holds out {count} of {available} rows: at least 1 must be held out and 1 stay for "
        f"training. Give a number from 1 to {available - 1}, a larger or smaller share, or a file."
    )


def draw(pool: Split[E], count: int, role: Role, seed: int) -> tuple[Split[E], Split[E]]:
    """Return (held-out split of `count` rows, what is left of `pool`), by a seeded choice.

    Rows of the pool that read the same as a held-out row are taken out of it and counted.

    Raises:
        UserError: when only duplicates of held-out rows would be left.
    """
    chosen = set(permutation(len(pool.examples), seed, _DRAW[role])[:count].tolist())
    held = [example for n, example in enumerate(pool.examples) if n in chosen]
    texts = {example.text() for example in held}
    rest = [e for n, e in enumerate(pool.examples) if n not in chosen and e.text() not in texts]
    if not rest:
        raise UserError(f"data.{role}: every row left for training reads the same as one of the {count} held-out rows.")
    duplicates = len(pool.examples) - count - len(rest)
    left = replace(pool, examples=rest, rows_read=pool.rows_read - count, duplicates=pool.duplicates + duplicates)
    return Split(role, held, rows_read=count, bad=pool.bad), left


def limit(split: Split[E], most: int | None, seed: int) -> None:
    """Keep at most `most` examples of `split`, by a seeded choice, in their order."""
    if most is not None and most < len(split.examples):
        stream = _LIMIT[split.role.partition("/")[0]]
        chosen = sorted(permutation(len(split.examples), seed, stream)[:most].tolist())
        split.examples = [split.examples[n] for n in chosen]


def make_splits(
    settings: DataSection, seed: int, read: Callable[[Role], Split[E]], classes: Sequence[str] | None = None
) -> list[Split[E]]:
    """Return the splits of a recipe, training first.

    The test rows are drawn first, then the validation rows: asking for validation changes no test row.

    Args:
        seed: of what is drawn.
        read: returns the split of a role that has a source of its own.
        classes: whose records data.shots counts; None: those that the training rows have.

    Raises:
        UserError: as `read`, `rows_wanted`, `draw` and `draw_shots`.
    """
    train = read("train")
    total = len(train.examples)
    if settings.shots and classes is None:
        classes = settings.labels or sorted({example.class_name() for example in train.examples})
    tests, validations = [read(role) for role in test_roles(settings)], []
    if isinstance(settings.test, float | int):
        drawn, train = draw(train, rows_wanted(settings.test, total, total, "test"), "test", seed)
        tests = [drawn]
    if isinstance(settings.validation, str):
        validations = [read("validation")]
    elif settings.validation is not None:
        count = rows_wanted(settings.validation, total, len(train.examples), "validation")
        drawn, train = draw(train, count, "validation", seed)
        validations = [drawn]
    limit(train, settings.max_rows, seed)
    if settings.shots and classes:
        drawn_by = seed if settings.shots_seed is None else settings.shots_seed
        train.examples = draw_shots(train.examples, settings.shots, drawn_by, classes)
    texts = {example.text() for example in train.examples}
    for split in tests:
        limit(split, settings.max_test_rows, seed)
    for split in (*validations, *tests):
        split.also_in_train = sum(example.text() in texts for example in split.examples)
    return [train, *validations, *tests]
