"""From the data section of a recipe with format images to image sets, once for each content of the data and recipe."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from glora_llm.data.cache import cached, key_of
from glora_llm.data.image_classes import ROLES, cell, class_names, class_numbers
from glora_llm.data.image_lists import ImageList
from glora_llm.data.image_pixels import PIXELS, Found, cached_pixels, digests_of, encoded_digest, side_of
from glora_llm.data.image_sources import locate_images
from glora_llm.data.image_store import ImageSet, write_rows
from glora_llm.data.report import ImageReport
from glora_llm.data.sources import Role, Sources, commits_of, locate_roles
from glora_llm.data.splits import Split, make_splits
from glora_llm.errors import UserError, nearest
from glora_llm.schema import DataSection, ImagesSection

TEXT_ONLY = ("prompt", "system", "chat_template", "bos", "max_tokens", "overlong", "packing", "bad_rows")
PREVIEWS = 3


@dataclass(frozen=True)
class PreparedImages:
    """The prepared images of a run.

    Attributes:
        tests: the test sets by role: `test`, or `test/NAME` of several.
        reports: by role, the counts of its images.
        names: of the classes, by number.
        mean, std: of red, green and blue, 0 to 1: the recipe's, or else those of the training images.
        previews: three training images in words.
        folder: of the arrays.
        commits: hub data set -> commit that was loaded.
    """

    train: ImageSet
    validation: ImageSet | None
    tests: dict[str, ImageSet]
    reports: dict[str, ImageReport]
    names: list[str]
    mean: list[float]
    std: list[float]
    previews: list[str]
    folder: Path
    commits: dict[str, str] = field(default_factory=dict)

    @property
    def test(self) -> ImageSet | None:
        """The test set, the first one of several."""
        return next(iter(self.tests.values()), None)


@dataclass(frozen=True)
class ImageExample:
    """An image of a source: its number there, its class by number and name, and what tells equal images apart."""

    number: int
    label: int
    name: str
    digest: str

    def text(self) -> str:
        """Return the digest of its pixels; with data.shots that of its file, which is the same on every machine."""
        return self.digest

    def class_name(self) -> str:
        """Return the name of its class."""
        return self.name


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
    # no other key of the images changes a pixel, and the content says what revisions gave
    kept = settings.model_copy(update={"images": ImagesSection(size=images.size), "revisions": None})
    found = {role: Found(role, source, source.fingerprint()) for role, source in sources.items()}
    content = {role: one.content for role, one in found.items()}
    key = key_of({"settings": kept.model_dump(mode="json"), "content": content, "seed": seed})
    folder = cached(cache, key, lambda partial: _build(partial, cache, settings, found, seed))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    pixels = _pixels(cache, settings, found, meta["decoded"])
    sets = {role: ImageSet(folder / role, pixels[of] / PIXELS, role) for role, of in meta["pixels"].items()}
    train = sets["train"]
    mean, std = meta["moments"] or (images.mean, images.std)
    if mean is None or std is None:
        mean, std = train.moments()  # of few images: no cost
    return PreparedImages(
        train=train,
        validation=sets.get("validation"),
        tests={role: rows for role, rows in sets.items() if role.partition("/")[0] == "test"},
        reports={role: replace(ImageReport(**counts), size=train.size) for role, counts in meta["reports"].items()},
        names=meta["names"],
        mean=images.mean or mean,
        std=images.std or std,
        previews=[f"{train.size} x {train.size} pixels: «{meta['names'][n]}»" for n in train.labels[:PREVIEWS]],
        folder=folder,
        commits=commits_of(sources.values()),
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
        if both and "/" in role:
            raise UserError(
                f"data.test, {role.partition('/')[2]}: {both[0]} is what is trained on. Name another split, file or "
                "folder (that of a folder here begins with ./)."
            )
        if both:
            raise UserError(
                f"data.{role}: {both[0]} is what is trained on. Name another split or folder (a folder may hold train/ "
                f"and test/, each with a subfolder for each class), or hold out a share: data.{role}=0.1"
            )
        held, trained = _listed(source), _listed(sources["train"])
        if role != "train" and held and held <= trained:
            raise UserError(
                f"data.{role}: all of the {len(held)} images of {source.parts[0]} are trained on. Of VTAB-1K, choose "
                "by data.split=train800 data.validation=val200, then train on data.split=train800val200 "
                "data.validation=null."
            )


def _listed(source: Sources) -> set[Path]:
    """Return the files of images that the lists of a source name."""
    lists = (part for part in source.parts if isinstance(part, ImageList))
    return {part.file.parent / path for part in lists for path, _ in part.lines}


def _pixels(
    cache: Path, settings: DataSection, found: dict[Role, Found], decoded: list[int] | None = None
) -> dict[Role, Path]:
    """Return the folders of the pixels of all sources, decoded where they are new.

    Args:
        decoded: numbers of the training images that are wanted; None: all.
    """
    folders: dict[Role, Path] = {}
    for role, one in found.items():  # the training images first: the others have their size
        side = side_of(folders["train"]) if folders else None
        folders[role] = cached_pixels(cache, one, settings, side, decoded if role == "train" else None)
    return folders


def _build(folder: Path, cache: Path, settings: DataSection, found: dict[Role, Found], seed: int) -> None:
    """Choose the images of each split; few-shot training decodes no other training images than those it uses."""
    tables = {role: one.source.read() for role, one in found.items()}
    names = class_names(settings, tables["train"])
    labels = {role: class_numbers(table, settings, names, role) for role, table in tables.items()}
    pixels = {} if settings.shots else _pixels(cache, settings, found)
    own: dict[Role, Split[ImageExample]] = {}
    for role, table in tables.items():
        digests = digests_of(pixels[role]) if pixels else [
            encoded_digest(cell(row, "image", settings), f"{role} row {n}") for n, row in enumerate(table.rows, 1)
        ]  # fmt: skip
        pairs = zip(labels[role], digests, strict=True)
        examples = [ImageExample(n, label, names[label], digest) for n, (label, digest) in enumerate(pairs)]
        own[role] = Split(role, examples, rows_read=len(examples))
    splits = make_splits(settings, seed, own.__getitem__, names)
    of = {split.role: split.role if split.role in tables else "train" for split in splits}
    used = sorted(e.number for split in splits if of[split.role] == "train" for e in split.examples)
    place = {number: n for n, number in enumerate(used)} if settings.shots else {}
    for split in splits:
        numbers = [e.number if of[split.role] != "train" else place.get(e.number, e.number) for e in split.examples]
        write_rows(folder / split.role, numbers, [e.label for e in split.examples])
    train = ImageSet(folder / "train", pixels["train"] / PIXELS, "train") if pixels else None
    meta = {
        "pixels": of,
        "decoded": used if settings.shots else None,
        "reports": {split.role: asdict(_report(split, names)) for split in splits},
        "names": names,
        "moments": train.moments() if train else None,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")


def _report(split: Split[ImageExample], names: list[str]) -> ImageReport:
    counts = Counter(example.label for example in split.examples)
    of_class = [counts[number] for number in range(len(names))]
    return ImageReport(
        split.role, split.rows_read, split.duplicates, split.also_in_train,
        kept=len(split.examples), classes=len(names), fewest=min(of_class), most=max(of_class),
    )  # fmt: skip
