"""Images from every kind of source, how they are split, and what a wrong one is told."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glora_llm.data.hub_source import HubSource
from glora_llm.data.image_store import ImageSet
from glora_llm.schema import ImagesSection
from tests.data.conftest import CLASSES, Prepare, hub_features, image_rows, picture, write_folder, write_parquet


def content(images: ImageSet) -> list[tuple[bytes, int]]:
    return [(images.row(n).pixels.tobytes(), images.row(n).label) for n in range(len(images))]


def expected(numbers: range, first: int = 0) -> list[tuple[bytes, int]]:
    return [(np.asarray(picture(first + n)).tobytes(), n % 3) for n in numbers]


@pytest.mark.parametrize("kind", ["hub schema", "plain", "words", "file paths", "bytes", "folder", "two files"])
def test_every_kind_of_source_gives_the_same_images(kind: str, prepared: Prepare, tmp_path: Path) -> None:
    source: str | list[str] = str(tmp_path / "a.parquet")
    keys: dict[str, Any] = {}
    if kind == "hub schema":
        write_parquet(tmp_path / "a.parquet", image_rows(), hub_features())
    elif kind == "plain":
        write_parquet(tmp_path / "a.parquet", image_rows())
        keys["labels"] = CLASSES
    elif kind == "words":
        named = [{"picture": row["img"], "animal": CLASSES[row["label"]]} for row in image_rows()]
        write_parquet(tmp_path / "a.parquet", named)
        keys["columns"] = {"image": "picture", "label": "animal"}
    elif kind == "file paths":
        for n in range(30):
            picture(n).save(tmp_path / f"{n}.png")
        paths = [{"bytes": None, "path": str(tmp_path / f"{n}.png")} for n in range(30)]
        write_parquet(tmp_path / "a.parquet", [{"image": path, "label": n % 3} for n, path in enumerate(paths)])
        keys["labels"] = CLASSES
    elif kind == "bytes":
        write_parquet(
            tmp_path / "a.parquet", [{"image": row["img"]["bytes"], "label": row["label"]} for row in image_rows()]
        )
        keys["labels"] = CLASSES
    elif kind == "folder":
        source = write_folder(tmp_path / "folder")
    else:
        halves = [image_rows()[:11], image_rows()[11:]]
        source = [write_parquet(tmp_path / f"{n}.parquet", half, hub_features()) for n, half in enumerate(halves)]
    data = prepared(source, **keys)
    assert data.names == CLASSES and (data.train.size, data.reports["train"].kept) == (8, 30)
    assert sorted(content(data.train)) == sorted(expected(range(30)))
    assert data.validation is None and data.test is None


def test_a_hub_data_set_is_read_as_its_parquet_file(tmp_path: Path) -> None:
    """`datasets` decodes images by itself; here their bytes are wanted."""
    write_parquet(tmp_path / "set" / "train.parquet", image_rows(), hub_features())
    table = HubSource(str(tmp_path / "set"), None, "train").read()
    assert table.label_names == {"label": CLASSES}
    assert [row["img"]["bytes"] for row in table.rows] == [row["img"]["bytes"] for row in image_rows()]


def test_folders_and_files_of_splits(prepared: Prepare, tmp_path: Path) -> None:
    write_folder(tmp_path / "tree" / "train", 30)
    write_folder(tmp_path / "tree" / "val", 6, first=100)
    write_parquet(tmp_path / "files" / "train.parquet", image_rows(30), hub_features())
    write_parquet(tmp_path / "files" / "validation.parquet", image_rows(6, 100), hub_features())
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
    twice = [row for row in image_rows() for _ in range(2)]
    source = write_parquet(tmp_path / "a.parquet", twice, hub_features())
    data = prepared(source, validation=10)
    assert data.validation is not None
    held, train = {pixels for pixels, _ in content(data.validation)}, {pixels for pixels, _ in content(data.train)}
    assert not held & train
    assert data.reports["train"].duplicates_removed == 60 - 10 - len(data.train) > 0
    test = write_parquet(tmp_path / "b.parquet", image_rows(3) + image_rows(3, 50), hub_features())
    data = prepared(source, test=test)
    assert data.test is not None
    assert (data.reports["test"].also_in_train, len(data.test), len(data.train)) == (3, 6, 60)
    assert "3 the same as a training image (kept)" in data.reports["test"].describe()


def test_images_are_resized_and_made_rgb(prepared: Prepare, tmp_path: Path) -> None:
    shapes = [(8, 8), (20, 10), (5, 9)]
    for n, size in enumerate(shapes * 2):
        place = tmp_path / "folder" / CLASSES[n % 2]
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
    (file,) = (tmp_path / "cache").glob("*/pixels.npy")
    made = file.stat().st_mtime_ns
    assert prepared(source, images=ImagesSection(flip=True, mixup=0.5)).folder == first.folder
    assert prepared(source, validation=6).folder != first.folder and file.stat().st_mtime_ns == made
    before = content(first.train)
    file.write_bytes(b"damaged")
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


CIFAR10 = Path(os.environ.get("GLORA_DATA", "")) / "cifar10"


@pytest.mark.slow
@pytest.mark.skipif(not (CIFAR10 / "train.parquet").is_file(), reason="needs GLORA_DATA with cifar10/train.parquet")
def test_cifar10_as_the_hub_has_it(prepared: Prepare) -> None:
    data = prepared("cifar10", test="test", validation=0.02)
    assert data.test is not None
    assert (data.names[0], data.names[9], data.train.size) == ("airplane", "truck", 32)
    assert (len(data.test), data.reports["test"].fewest, data.reports["test"].most) == (10_000, 1000, 1000)
    assert len(data.train) + 1000 + data.reports["train"].duplicates_removed == 50_000
    np.testing.assert_allclose(data.mean, [0.491, 0.482, 0.447], atol=2e-3)
