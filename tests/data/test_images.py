"""Images from every kind of source, how they are split, and what a wrong one is told."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glora_llm.data.image_store import ImageSet
from glora_llm.data.images import PreparedImages, prepare_images
from glora_llm.data.sources import HubSource
from glora_llm.errors import UserError
from glora_llm.schema import DataSection, ImagesSection

NAMES = ["cat", "dog", "owl"]
Prepare = Callable[..., PreparedImages]


def picture(number: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    random = np.random.default_rng(number)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def rows(count: int = 30, first: int = 0) -> list[dict[str, Any]]:
    """Row n holds picture n, of class n modulo 3."""
    return [{"img": {"bytes": encoded(picture(first + n)), "path": None}, "label": n % 3} for n in range(count)]


def write_parquet(path: Path, content: list[dict[str, Any]], features: Any = None) -> str:
    import datasets

    path.parent.mkdir(exist_ok=True, parents=True)
    datasets.Dataset.from_list(content, features=features).to_parquet(str(path))
    return str(path)


def hub_features() -> Any:
    import datasets

    return datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})


def write_folder(folder: Path, count: int = 30, first: int = 0) -> str:
    for n in range(count):
        place = folder / NAMES[n % 3]
        place.mkdir(exist_ok=True, parents=True)
        picture(first + n).save(place / f"{n:03d}.png")
    return str(folder)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    def make(source: str | list[str], cache: str = "cache", seed: int = 0, **keys: Any) -> PreparedImages:
        settings = DataSection(**{"format": "images", "source": source, **keys})
        return prepare_images(settings, tmp_path / cache, seed)

    return make


def refused(prepared: Prepare, *arguments: Any, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepared(*arguments, **keys)
    return str(caught.value)


def content(images: ImageSet) -> list[tuple[bytes, int]]:
    return [(images.row(n).pixels.tobytes(), images.row(n).label) for n in range(len(images))]


def expected(numbers: range, first: int = 0) -> list[tuple[bytes, int]]:
    return [(np.asarray(picture(first + n)).tobytes(), n % 3) for n in numbers]


@pytest.mark.parametrize("kind", ["hub schema", "plain", "words", "file paths", "bytes", "folder", "two files"])
def test_every_kind_of_source_gives_the_same_images(kind: str, prepared: Prepare, tmp_path: Path) -> None:
    source: str | list[str] = str(tmp_path / "a.parquet")
    keys: dict[str, Any] = {}
    if kind == "hub schema":
        write_parquet(tmp_path / "a.parquet", rows(), hub_features())
    elif kind == "plain":
        write_parquet(tmp_path / "a.parquet", rows())
        keys["labels"] = NAMES
    elif kind == "words":
        named = [{"picture": row["img"], "animal": NAMES[row["label"]]} for row in rows()]
        write_parquet(tmp_path / "a.parquet", named)
        keys["columns"] = {"image": "picture", "label": "animal"}
    elif kind == "file paths":
        for n in range(30):
            picture(n).save(tmp_path / f"{n}.png")
        paths = [{"bytes": None, "path": str(tmp_path / f"{n}.png")} for n in range(30)]
        write_parquet(tmp_path / "a.parquet", [{"image": path, "label": n % 3} for n, path in enumerate(paths)])
        keys["labels"] = NAMES
    elif kind == "bytes":
        write_parquet(tmp_path / "a.parquet", [{"image": row["img"]["bytes"], "label": row["label"]} for row in rows()])
        keys["labels"] = NAMES
    elif kind == "folder":
        source = write_folder(tmp_path / "folder")
    else:
        halves = [rows()[:11], rows()[11:]]
        source = [write_parquet(tmp_path / f"{n}.parquet", half, hub_features()) for n, half in enumerate(halves)]
    data = prepared(source, **keys)
    assert data.names == NAMES and (data.train.size, data.reports["train"].kept) == (8, 30)
    assert sorted(content(data.train)) == sorted(expected(range(30)))
    assert data.validation is None and data.test is None


def test_a_hub_data_set_is_read_as_its_parquet_file(tmp_path: Path) -> None:
    """`datasets` decodes images by itself; here their bytes are wanted."""
    write_parquet(tmp_path / "set" / "train.parquet", rows(), hub_features())
    table = HubSource(str(tmp_path / "set"), None, "train").read(documents=False)
    assert table.label_names == {"label": NAMES}
    assert [row["img"]["bytes"] for row in table.rows] == [row["img"]["bytes"] for row in rows()]


def test_folders_and_files_of_splits(prepared: Prepare, tmp_path: Path) -> None:
    write_folder(tmp_path / "tree" / "train", 30)
    write_folder(tmp_path / "tree" / "val", 6, first=100)
    write_parquet(tmp_path / "files" / "train.parquet", rows(30), hub_features())
    write_parquet(tmp_path / "files" / "validation.parquet", rows(6, 100), hub_features())
    write_folder(tmp_path / "apart", 9, first=200)
    for name in ("tree", "files"):
        data = prepared(str(tmp_path / name), validation="validation", test=str(tmp_path / "apart"))
        assert data.validation is not None and data.test is not None
        assert sorted(content(data.validation)) == sorted(expected(range(6), 100))
        assert sorted(content(data.test)) == sorted(expected(range(9), 200))
        assert len(data.train) == 30


def test_shares_numbers_and_limits_are_drawn_by_the_seed(prepared: Prepare, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "folder")
    data = prepared(source, validation=0.2, test=5, max_rows=12, max_test_rows=4)
    assert data.validation is not None and data.test is not None
    assert [len(part) for part in (data.train, data.validation, data.test)] == [12, 6, 4]
    everything = content(data.train) + content(data.validation) + content(data.test)
    assert len(set(everything)) == 22 and set(everything) <= set(expected(range(30)))
    without = prepared(source, test=5, max_test_rows=4)
    assert without.test is not None and content(without.test) == content(data.test)
    other = prepared(source, validation=0.2, test=5, seed=1)
    assert other.validation is not None and content(other.validation) != content(data.validation)


def test_equal_pixels_do_not_leak(prepared: Prepare, tmp_path: Path) -> None:
    """Each picture twice: the twin of a held-out one leaves the training images; one of a file of its own is kept."""
    twice = [row for row in rows() for _ in range(2)]
    source = write_parquet(tmp_path / "a.parquet", twice, hub_features())
    data = prepared(source, validation=10)
    assert data.validation is not None
    held, train = {pixels for pixels, _ in content(data.validation)}, {pixels for pixels, _ in content(data.train)}
    assert not held & train
    assert data.reports["train"].duplicates_removed == 60 - 10 - len(data.train) > 0
    test = write_parquet(tmp_path / "b.parquet", rows(3) + rows(3, 50), hub_features())
    data = prepared(source, test=test)
    assert data.test is not None
    assert (data.reports["test"].also_in_train, len(data.test), len(data.train)) == (3, 6, 60)
    assert "3 the same as a training image (kept)" in data.reports["test"].describe()


def test_images_are_resized_and_made_rgb(prepared: Prepare, tmp_path: Path) -> None:
    shapes = [(8, 8), (20, 10), (5, 9)]
    for n, size in enumerate(shapes * 2):
        place = tmp_path / "folder" / NAMES[n % 2]
        place.mkdir(exist_ok=True, parents=True)
        image = picture(n, size)
        (image.convert("L") if n == 1 else image.convert("P") if n == 2 else image).save(place / f"{n}.png")
    data = prepared(str(tmp_path / "folder"), images=ImagesSection(size=8))
    assert data.train.row(0).pixels.shape == (8, 8, 3) and data.train.size == 8
    grey = [pixels for pixels, _ in content(data.train)]
    raw = np.asarray(picture(1, (20, 10)).convert("L").convert("RGB").resize((8, 8), Image.Resampling.BILINEAR))
    assert raw.tobytes() in grey


def test_mean_and_deviation_are_those_of_the_training_images(prepared: Prepare, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "folder")
    data = prepared(source, validation=10)
    pixels = np.stack([data.train.row(n).pixels for n in range(len(data.train))]).reshape(-1, 3) / 255
    np.testing.assert_allclose(data.mean, pixels.mean(0), atol=1e-5)
    np.testing.assert_allclose(data.std, pixels.std(0), atol=1e-5)
    given = prepared(source, validation=10, images=ImagesSection(mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0]))
    assert (given.mean, given.std, given.folder) == ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0], data.folder)


def test_the_cache_is_used_and_made_again_when_it_is_damaged(prepared: Prepare, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "folder")
    first = prepared(source)
    made = (first.folder / "train.npy").stat().st_mtime_ns
    assert prepared(source, images=ImagesSection(flip=True, mixup=0.5)).folder == first.folder
    assert (first.folder / "train.npy").stat().st_mtime_ns == made
    before = content(first.train)
    (first.folder / "train.npy").write_bytes(b"damaged")
    assert content(prepared(source).train) == before
    picture(99).save(tmp_path / "folder" / "cat" / "new.png")
    assert prepared(source).folder != first.folder


def test_a_sealed_set_is_not_read_and_its_digest_is_that_of_its_content(prepared: Prepare, tmp_path: Path) -> None:
    data = prepared(write_folder(tmp_path / "folder"), test=6)
    assert data.test is not None
    with data.test.sealed("paths are chosen"), pytest.raises(RuntimeError, match="test rows were read while paths are"):
        data.test.row(0)
    assert data.test.row(0).pixels.shape == (8, 8, 3)
    with pytest.raises(IndexError, match="rows 0 to 5"):
        data.test.row(6)
    again = prepared(str(tmp_path / "folder"), cache="another", test=6)
    assert again.train.digest() == data.train.digest() != prepared(str(tmp_path / "folder"), test=7).train.digest()


def test_generated_images_are_the_same_every_time_and_have_two_tasks(prepared: Prepare) -> None:
    data, again = (prepared("embedded:shapes", cache=cache, test="test") for cache in ("one", "two"))
    assert data.test is not None and (len(data.train), len(data.test)) == (4096, 1024)
    assert data.train.digest() == again.train.digest() and data.names[0] == "disc"
    assert data.reports["test"].also_in_train == 0
    colours = prepared("embedded:colours")
    assert colours.names == ["red", "green", "blue", "yellow"] and colours.reports["train"].fewest > 900


def not_an_image(folder: Path) -> None:
    (folder / "dog" / "001.png").write_bytes(b"no image")


def cut_off(folder: Path) -> None:
    file = folder / "dog" / "001.png"
    file.write_bytes(file.read_bytes()[:60])


def another_size(folder: Path) -> None:
    picture(1, (8, 9)).save(folder / "dog" / "001.png")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (not_an_image, ["train row 11 (", "dog/001.png) is not a readable image: cannot identify image file"]),
        (cut_off, ["dog/001.png) is not a readable image: "]),
        (another_size, ["train row 11 is an image of 8 x 9 pixels; expected 8 x 8 for all. Set data.images.size=8"]),
    ],
)
def test_an_image_that_cannot_be_used(
    damage: Callable[[Path], None], said: list[str], prepared: Prepare, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "folder")
    damage(tmp_path / "folder")
    message = refused(prepared, source)
    for part in said:
        assert part in message
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_bytes_that_are_no_image_are_named_by_their_row(prepared: Prepare, tmp_path: Path) -> None:
    content = rows()
    content[4]["img"]["bytes"] = b"nothing"
    message = refused(prepared, write_parquet(tmp_path / "a.parquet", content))
    assert message.startswith("train row 5 is not a readable image: cannot identify image file.")


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("labels.parquet", {"columns": {"label": "klass"}}, ["no column 'klass'", "columns are: img, label"]),
        ("labels.parquet", {"columns": {"image": "imgs"}}, ["no column 'imgs'", "Did you mean 'img'?"]),
        ("labels.parquet", {"columns": {"imag": "img"}}, ["the role 'imag'", "Did you mean 'image'?"]),
        ("labels.parquet", {"columns": {"image": "label"}}, ["train row 1 holds a value of type int", "is no image"]),
        ("labels.parquet", {"labels": ["a", "b"]}, ["train row 3: label 2 is none of the 2 classes (a, b): exp"]),
        ("labels.parquet", {"packing": True}, ["data.packing belongs to text", "data.packing=false takes it away"]),
        ("labels.parquet", {"max_tokens": 64}, ["data.max_tokens belongs to text"]),
        ("labels.parquet", {"test": "test.parquet"}, ["There is no file test.parquet"]),
        ("negative.parquet", {}, ["train row 1: label -1 is none of the"]),
        ("one.parquet", {}, ["all of one class (0)"]),
        ("tree", {"test": "test"}, ["data.test: the folder ", "tree is what is trained on", "data.test=0.1"]),
        ("flat", {}, ["holds images and no classes: expected a subfolder for each class"]),
        ("nothing", {}, ["has no file for split 'train'"]),
        ("embedded:shape", {}, ["embedded image data set 'shape'", "Did you mean 'shapes'?"]),
        ("embedded:banking77", {}, ["embedded image data set 'banking77'; there is: shapes, colours"]),
        ("embedded:shapes", {"split": "tests"}, ["no split 'tests'", "Did you mean 'test'?"]),
        ("text.jsonl", {}, ["There is no column 'label'; the columns are: text."]),
    ],
)  # fmt: skip
def test_a_wrong_source(name: str, keys: dict[str, Any], said: list[str], prepared: Prepare, tmp_path: Path) -> None:
    write_parquet(tmp_path / "labels.parquet", rows(), hub_features() if "labels" not in keys else None)
    write_parquet(tmp_path / "negative.parquet", [{**row, "label": row["label"] - 1} for row in rows()])
    write_parquet(tmp_path / "one.parquet", [{**row, "label": 0} for row in rows()])
    write_folder(tmp_path / "tree")
    (tmp_path / "flat").mkdir()
    picture(0).save(tmp_path / "flat" / "a.png")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    message = refused(prepared, name if name.startswith("embedded:") else str(tmp_path / name), **keys)
    for part in said:
        assert part in message


def test_an_unknown_class_of_a_held_out_folder(prepared: Prepare, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "folder")
    (tmp_path / "held" / "cats").mkdir(parents=True)
    picture(0).save(tmp_path / "held" / "cats" / "a.png")
    message = refused(prepared, source, test=str(tmp_path / "held"))
    assert "test row 1: label 0 is none of the 3 classes (cat, dog, owl)" in message
    assert "Did you mean 'cat'?" in message
