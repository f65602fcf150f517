"""Every test that is marked `gpu` has a twin that runs on the CPU, so none of them is code that nobody has ever run."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

LEAST = 25
ROOT = Path(__file__).parent


def identity(item: Any, device: str) -> tuple[Any, ...]:
    """Return file, function and parameters of a test, with `device` in the place of the device that it is given."""
    parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    if "device" in parameters:
        parameters["device"] = device
    return item.path, item.originalname, tuple(sorted((name, repr(value)) for name, value in parameters.items()))


def test_gpu_tests_have_twins(collected: list[Any]) -> None:
    """By the fixture `device`; or `test_NAME_on_gpu` beside `test_NAME` in the same file."""
    if {item.path for item in collected} < set(ROOT.rglob("test_*.py")):
        pytest.skip("only the whole suite has all twins")
    marked = [item for item in collected if item.get_closest_marker("gpu")]
    others = {identity(item, "cpu") for item in collected if not item.get_closest_marker("gpu")}
    names = {(item.path, item.originalname) for item in collected if not item.get_closest_marker("gpu")}
    alone = [
        item.nodeid
        for item in marked
        if identity(item, "cpu") not in others
        and (item.path, item.originalname.removesuffix("_on_gpu")) not in names - {(item.path, item.originalname)}
    ]
    assert not alone, "tests for a GPU without a twin on the CPU"
    assert len(marked) >= LEAST, Counter(item.path.name for item in marked)
