"""What is told to the user whose images cannot be used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glora_llm.errors import UserError
from tests.data.conftest import Prepare, hub_features, image_rows, picture, write_folder, write_parquet


def refused(prepared: Prepare, *arguments: Any, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepared(*arguments, **keys)
    return str(caught.value)


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
    content = image_rows()
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
    write_parquet(tmp_path / "labels.parquet", image_rows(), hub_features() if "labels" not in keys else None)
    write_parquet(tmp_path / "negative.parquet", [{**row, "label": row["label"] - 1} for row in image_rows()])
    write_parquet(tmp_path / "one.parquet", [{**row, "label": 0} for row in image_rows()])
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
    assert "test row 1: label 0 (cats) is none of the 3 classes (cat, dog, owl)" in message
    assert "Did you mean 'cat'?" in message
