"""Lists of images as VTAB-1K has them, both of its phases, and what a damaged list is told."""

from pathlib import Path

import pytest

from glora_llm.errors import UserError
from tests.data.conftest import Prepare, picture


@pytest.fixture
def vtab(tmp_path: Path) -> Path:
    """Ten training images of five classes, eight of them for training while choices are made, and four test images."""
    folder = tmp_path / "cifar"
    for n in range(14):
        place = folder / "images" / ("train" if n < 10 else "test")
        place.mkdir(parents=True, exist_ok=True)
        picture(n).save(place / f"{n:06d}.png")
    lines = [f"images/{'train' if n < 10 else 'test'}/{n:06d}.png {n % 5}" for n in range(14)]
    for name, part in (("train800", lines[:4] + lines[5:9]), ("val200", [lines[4], lines[9]]),
                       ("train800val200", lines[:10]), ("test", lines[10:])):  # fmt: skip
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n")
    return folder


def test_the_two_phases(vtab: Path, prepared: Prepare) -> None:
    first = prepared(str(vtab), split="train800", validation="val200")
    assert first.validation is not None and first.test is None
    assert (len(first.train), len(first.validation)) == (8, 2)
    assert first.names == ["0", "1", "2", "3", "4"], "train800 alone has no class 4: all lists count"
    assert first.validation.labels.tolist() == [4, 4] and 4 not in first.train.labels
    second = prepared(str(vtab), split="train800val200", test="test")
    assert second.test is not None and (len(second.train), len(second.test)) == (10, 4)
    assert second.test.row(0).pixels.tobytes() == picture(10).tobytes() and second.test.labels.tolist() == [0, 1, 2, 3]
    named = prepared(str(vtab), split="train800", labels=list("abcde"), test={"held": str(vtab / "val200.txt")})
    assert named.names[4] == "e" and named.tests["test/held"].labels.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"split": "train800val200", "validation": "val200"}, "all of the 2 images of the list "),
        ({}, "none for split 'train': there is test, train800, train800val200, val200. Did you mean 'train800'?"),
        (
            {"split": "train80"},
            "Did you mean 'train800'? VTAB-1K: choose by data.split=train800 data.validation=val200",
        ),
    ],
)
def test_a_wrong_phase(keys: dict[str, str], said: str, vtab: Path, prepared: Prepare) -> None:
    with pytest.raises(UserError) as caught:
        prepared(str(vtab), **keys)
    assert said in str(caught.value)


def test_a_list_that_names_a_missing_image(vtab: Path, prepared: Prepare) -> None:
    for n in (2, 7):
        (vtab / "images" / "train" / f"{n:06d}.png").unlink()
    with pytest.raises(UserError, match=r"train800.txt, line 3: there is no image .*000002.png, and 1 more images"):
        prepared(str(vtab), split="train800")


@pytest.mark.parametrize("line", ["images/train/000000.png", "images/train/000000.png cat", "4"])
def test_a_line_of_another_form(line: str, vtab: Path, prepared: Prepare) -> None:
    file = vtab / "train800.txt"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=rf"train800.txt, line 9: got '{line}', expected `PATH LABEL`"):
        prepared(str(vtab), split="train800")
