"""From the data section of a recipe with format images to image sets, once for each content of the data and recipe."""

import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glora_llm.data.cache import cached, key_of
from glora_llm.data.columns import Row, value
from glora_llm.data.image_decode import decode
from glora_llm.data.image_sources import locate_images
from glora_llm.data.image_store import ImageSet, write_rows
from glora_llm.data.report import ImageReport
from glora_llm.data.sources import Role, Sources, locate_roles
from glora_llm.data.splits import Split, make_splits
from glora_llm.data.table import Table
from glora_llm.errors import UserError, nearest
from glora_llm.schema import DataSection, ImagesSection

ROLES = {"image": ("image", "img"), "label": ("label", "labels")}  # the columns of hub data sets, in this order
TEXT_ONLY = ("prompt", "system", "chat_template", "bos", "max_tokens", "overlong", "packing", "bad_rows")
PREVIEWS = 3
AT_ONCE = 4096  # images that threads decode before the next ones are given out


@dataclass(frozen=True)
class PreparedImages:
    """The prepared images of a run.

    Attributes:
        reports: by role, the counts of its images.
        names: of the classes, by number.
        mean, std: of red, green and blue, 0 to 1: the recipe's, or else those of the training images.
        previews: three training images in words.
        folder: of the arrays.
    """

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet | None
    reports: dict[str, ImageReport]
    names: list[str]
    mean: list[float]
    std: list[float]
    previews: list[str]
    folder: Path


@dataclass(frozen=True)
class ImageExample:
    """An image of a source: its number there, the number of its class, and what tells equal images apart."""

    number: int
    label: int
    digest: str

    def text(self) -> str:
        """Return the digest of the pixels."""
        return self.digest


def prepare_images(settings: DataSection, cache: Path, seed: int) -> PreparedImages:
    """Return the image sets of a recipe, from the cache if they were made before.

    Every process may call this, before torch.distributed starts: one process works, the others wait.

    Args:
        cache: folder of prepared data; a subfolder is made for each combination of settings and content.
        seed: of the choice of held-out images, data.max_rows and data.max_test_rows.

    Raises:
        UserError: for settings that do not fit together, and data that do not fit the settings.
    """
    check_image_settings(settings)
    sources = locate_roles(settings, locate_images)
    _check_apart(sources)
    images = settings.images or ImagesSection()
    kept = settings.model_copy(update={"images": ImagesSection(size=images.size)})  # no other key changes a pixel
    content = {role: source.fingerprint() for role, source in sources.items()}
    key = key_of({"settings": kept.model_dump(mode="json"), "content": content, "seed": seed})
    folder = cached(cache, key, lambda partial: _build(partial, settings, sources, seed))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    sets = {role: ImageSet(folder / role, folder / f"{of}.npy", role) for role, of in meta["pixels"].items()}
    return PreparedImages(
        train=sets["train"],
        validation=sets.get("validation"),
        test=sets.get("test"),
        reports={role: ImageReport(**counts) for role, counts in meta["reports"].items()},
        names=meta["names"],
        mean=images.mean or meta["mean"],
        std=images.std or meta["std"],
        previews=meta["previews"],
        folder=folder,
    )


def check_image_settings(settings: DataSection) -> None:
    """Check that the data section says nothing that only text has.

    Raises:
        UserError: naming the key, and what to change.
    """
    for name in TEXT_ONLY:
        default = DataSection.model_fields[name].default
        if getattr(settings, name) != default:
            plain = json.dumps(default)
            raise UserError(
                f"data.{name} belongs to text, and data.format is images: data.{name}={plain} takes it away."
            )
    for role in settings.columns or {}:
        if role not in ROLES:
            raise UserError(
                f"data.columns names the role '{role}', which format images does not read; it reads: "
                f"{', '.join(ROLES)}.{nearest(role, ROLES)}"
            )


def _check_apart(sources: dict[Role, Sources]) -> None:
    for role, source in sources.items():
        both = [part for part in source.parts if role != "train" and part in sources["train"].parts]
        if both:
            raise UserError(
                f"data.{role}: {both[0]} is what is trained on. Name another split or folder (a folder may hold train/ "
                f"and test/, each with a subfolder for each class), or hold out a share: data.{role}=0.1"
            )


def _build(folder: Path, settings: DataSection, sources: dict[Role, Sources], seed: int) -> None:
    tables = {role: source.read() for role, source in sources.items()}
    names = class_names(settings, tables)
    size = settings.images.size if settings.images else None
    own: dict[Role, Split[ImageExample]] = {}
    for role, table in tables.items():
        labels = class_numbers(table, settings, names, role)
        digests = write_pixels(folder / f"{role}.npy", table.rows, settings, size, role)
        size = int(np.load(folder / f"{role}.npy", mmap_mode="r").shape[1])
        examples = [ImageExample(n, *pair) for n, pair in enumerate(zip(labels, digests, strict=True))]
        own[role] = Split(role, examples, rows_read=len(examples))
    pixels, reports = {}, {}
    for split in make_splits(settings, seed, own.__getitem__):
        role = split.role
        labels = [example.label for example in split.examples]
        write_rows(folder / role, [example.number for example in split.examples], labels)
        pixels[role] = role if role in tables else "train"
        reports[role] = asdict(_report(split, names, size or 0))
    train = ImageSet(folder / "train", folder / "train.npy", "train")
    mean, std = train.moments()
    previews = [f"{size} x {size} pixels: «{names[int(label)]}»" for label in train.labels[:PREVIEWS]]
    meta = {"pixels": pixels, "reports": reports, "names": names, "mean": mean, "std": std, "previews": previews}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")


def _report(split: Split[ImageExample], names: list[str], size: int) -> ImageReport:
    counts = Counter(example.label for example in split.examples)
    of_class = [counts[number] for number in range(len(names))]
    return ImageReport(
        split.role, split.rows_read, split.duplicates, split.also_in_train,
        kept=len(split.examples), size=size, classes=len(names), fewest=min(of_class), most=max(of_class),
    )  # fmt: skip


def cell(row: Row, role: str, settings: DataSection) -> Any:
    """Return the column of `row` that plays `role`: the one that data.columns names, else a usual one.

    Raises:
        UserError: when the row has no such column; the message lists those that it has.
    """
    usual = next((name for name in ROLES[role] if name in row), None)
    return row[usual] if usual and role not in (settings.columns or {}) else value(row, role, settings)


def class_names(settings: DataSection, tables: dict[Role, Table]) -> list[str]:
    """Return the names of the classes: data.labels, else those that the data state, else those of the training rows.

    Raises:
        UserError: when there is one class or none.
    """
    labels = [cell(row, "label", settings) for row in tables["train"].rows]
    names = settings.labels or _stated(tables["train"], settings)
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
            raise UserError(
                f"{role} row {place}: label {label!r} is none of the {len(names)} classes ({', '.join(names[:8])}"
                f"{', ...' if len(names) > 8 else ''}): expected 0 to {len(names) - 1}, or a name."
                f"{nearest(str(word), names)}"
            )
        numbers.append(number)
    return numbers


def write_pixels(file: Path, rows: list[Row], settings: DataSection, size: int | None, role: Role) -> list[str]:
    """Decode the images of a source into one array (N, size, size, 3) uint8; return a digest of each image.

    Args:
        size: of the images; None: that of the first one.

    Raises:
        UserError: for an image that cannot be read, or has another size than the first.
    """
    resize = settings.images.size if settings.images else None
    first = decode(cell(rows[0], "image", settings), resize, f"{role} row 1")
    side = size or first.shape[0]
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(len(rows), side, side, 3))

    def put(number: int) -> str:
        pixels = decode(cell(rows[number], "image", settings), resize, f"{role} row {number + 1}")
        if pixels.shape != (side, side, 3):
            raise UserError(
                f"{role} row {number + 1} is an image of {pixels.shape[1]} x {pixels.shape[0]} pixels; expected "
                f"{side} x {side} for all. Set data.images.size={side} to resize them."
            )
        array[number] = pixels
        return hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()

    digests: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter while it decodes
        for start in range(0, len(rows), AT_ONCE):
            digests += pool.map(put, range(start, min(start + AT_ONCE, len(rows))))
    array.flush()
    return digests
