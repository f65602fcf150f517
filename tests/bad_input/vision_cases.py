"""Few-shot draws, named test sets, and VTAB-1K's lists of images."""

import json
from pathlib import Path

from PIL import Image

from tests.bad_input.case import Case, Change, bad, both, file

VIT = (
    "model={config: {model_type: vit, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, "
    "num_attention_heads: 2, patch_size: 4}}",
    "adapter={method: full}",
)
TEXT = "data={format: classification, source: labels.jsonl, max_tokens: 64, validation: 2, KEYS}"


def pictures(*classes: str, count: int = 3, root: str = "pictures") -> Change:
    """Return what writes a folder of images of 8 x 8 pixels, a subfolder for each class."""

    def change(folder: Path) -> None:
        for number, name in enumerate(classes):
            (folder / root / name).mkdir(parents=True, exist_ok=True)
            for n in range(count):
                Image.new("RGB", (8, 8), (20 * n, 40 * number, 99)).save(folder / root / name / f"{n}.png")

    return change


def words(name: str, *labels: str, count: int = 3) -> Change:
    """Return what writes labelled texts."""
    rows = [{"text": f"text {n} of {label}", "label": label} for label in labels for n in range(count)]
    return file(name, "".join(json.dumps(row) + "\n" for row in rows))


def images(says: str, keys: str, *changes: Change) -> Case:
    made = both(pictures("cat", "dog"), *changes)
    return bad(says, *VIT, f"data={{format: images, source: pictures, {keys}}}", change=made)


def text(says: str, keys: str, *changes: Change) -> Case:
    made = both(words("labels.jsonl", "cat", "dog"), *changes)
    return bad(says, TEXT.replace("KEYS", keys), change=made)


def vtab(says: str, keys: str, lines: str = "pictures/cat/0.png 0\npictures/dog/1.png 1\n") -> Case:
    lists = both(
        file("train800.txt", lines),
        file("val200.txt", "pictures/cat/2.png 0\n"),
        file("train800val200.txt", lines + "pictures/cat/2.png 0\n"),
    )
    made = both(pictures("cat", "dog"), lists)
    return bad(says, *VIT, f"data={{format: images, source: ., {keys}}}", change=made)


VISION: dict[str, Case] = {
    "shots: two of each class": images("", "shots: 2"),
    "shots: of text without classes": bad(
        "shots are records of each class, and format 'prompt_completion' has no", "data.shots=4"
    ),
    "shots: none": images("data.shots: got 0 (integer), expected greater than 0.", "shots: 0"),
    "shots: a share": images("data.shots: got 0.5 (number), expected an integer.", "shots: 0.5"),
    "shots: more than a class of images has": images(
        "and class 'cat' has 3 (and 1 more classes have too few). Set data.shots=3", "shots: 4"
    ),
    "shots: more than a class of text has": text(
        "and class 'cat' has 2 (and 1 more classes have too few). Set data.shots=2", "shots: 3"
    ),
    "shots: a class without records": text(
        "and class 'owl' has 0. Take the class out of", "shots: 1, labels: [cat, dog, owl]"
    ),
    "shots: with max_rows": images(
        "shots and max_rows both say how many records are trained on: set one", "shots: 1, max_rows: 2"
    ),
    "shots_seed: without shots": images("shots_seed is of the draw of shots: set data.shots=N, or", "shots_seed: 3"),
    "shots_seed: below zero": images(
        "data.shots_seed: got -1 (integer), expected greater than or equal to 0.", "shots: 1, shots_seed: -1"
    ),
    "test: two named sets": images(
        "", "test: {again: ./one, half: ./two}", pictures("dog", root="one"), pictures("cat", root="two")
    ),
    "test: a named set that is not there": images(
        "data.test, sketch: There is no file elsewhere/sketch.", "test: {sketch: elsewhere/sketch/}"
    ),
    "test: a named set of other images' classes": images(
        "test/sketch row 1: label 0 (dogs) is none of the 2 classes (cat, dog)",
        "test: {sketch: ./other}",
        pictures("dogs", root="other"),
    ),
    "test: a named set of the training images": images(
        "data.test, sketch: the folder pictures is what is trained on.", "test: {sketch: ./pictures}"
    ),
    "test: a named set of other label words": text(
        "data.test, new: class 'fox' is not among those of the training rows",
        "test: {new: new.jsonl}",
        words("new.jsonl", "dog", "fox"),
    ),
    "test: a named file that is not there": text(
        "data.test, new: There is no file new.jsonl.", "test: {new: new.jsonl}"
    ),
    "test: no named set": text("data.test: an empty mapping: give name: SOURCE for each test set", "test: {}"),
    "test: a named share": text("data.test.own: got 0.1 (number), expected text.", "test: {own: 0.1}"),
    "test: a name with a slash": text(
        "data.test: 'a/b' names a test set, and should be letters, digits", "test: {a/b: labels.jsonl}"
    ),
    "VTAB-1K: its first phase": vtab("", "split: train800, validation: val200"),
    "VTAB-1K: no split": vtab(
        "has lists of images, and none for split 'train': there is train800,", "validation: val200"
    ),
    "VTAB-1K: validation images that are trained on": vtab(
        "data.validation: all of the 1 images of the list val200.txt are trained",
        "split: train800val200, validation: val200",
    ),
    "VTAB-1K: an image that is not there": vtab(
        "train800.txt, line 2: there is no image images/9.png.",
        "split: train800",
        "pictures/cat/0.png 0\nimages/9.png 1\n",
    ),
    "VTAB-1K: a line without a label": vtab(
        "train800.txt, line 2: got 'pictures/dog/1.png', expected `PATH LABEL`",
        "split: train800",
        "pictures/cat/0.png 0\npictures/dog/1.png\n",
    ),
    "VTAB-1K: an image that is none": vtab(
        "train row 2 (val200.txt) is not a readable image", "split: train800", "pictures/cat/0.png 0\nval200.txt 1\n"
    ),
}
