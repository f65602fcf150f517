"""The comparison of few-shot methods: its two tasks, and what it calls level."""

from pathlib import Path

import pyarrow.parquet
import pytest

from scripts import bench_fewshot
from tests.data.conftest import encoded, picture, write_parquet

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_the_tasks_share_no_class_and_lose_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = [{"img": {"bytes": encoded(picture(n)), "path": None}, "label": n % 10} for n in range(30)]
    for role in ("train", "test"):
        write_parquet(tmp_path / "data" / "cifar10" / f"{role}.parquet", rows, features)
    monkeypatch.setenv("GLORA_DATA", str(tmp_path / "data"))
    folder = bench_fewshot.split(tmp_path / "out")
    found = {}
    for task in ("first", "second"):
        table = datasets.load_dataset("parquet", data_files=str(folder / task / "train.parquet"), split="train")
        names = table.features["label"].names
        found[task] = {(names[row["label"]], row["img"].tobytes()) for row in table}
        assert len(pyarrow.parquet.read_table(folder / task / "test.parquet")) == 3 * len(names)
    assert {name for name, _ in found["second"]} == set(bench_fewshot.NEW)
    assert found["first"] | found["second"] == {(NAMES[n % 10], picture(n).tobytes()) for n in range(30)}
    assert not found["first"] & found["second"]


@pytest.mark.parametrize(
    ("values", "others", "said"),
    [
        ([0.7, 0.6, 0.8], [0.7, 0.7, 0.7], "+0.000 ± 0.058, level"),
        ([0.9, 0.8, 0.91], [0.7, 0.65, 0.75], "+0.170 ± 0.015, better"),  # apart by 0.2, 0.15 and 0.16
        ([0.5, 0.4, 0.6], [0.7, 0.61, 0.8], "-0.203 ± 0.003, worse"),
        ([0.5, 0.5, 0.5], [0.7, 0.6, 0.8], "-0.200 ± 0.058, level"),  # 3.5 standard errors; three draws ask for 4.3
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], ""),
    ],
)
def test_level_is_what_a_paired_t_test_does_not_tell_apart(values: list[float], others: list[float], said: str) -> None:
    assert bench_fewshot.compare(values, others) == said
