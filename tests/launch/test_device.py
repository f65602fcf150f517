"""Which device a process computes on, with and without GPUs that torch can use."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glora_llm.errors import UserError
from glora_llm.launch import device as device_module
from glora_llm.launch.device import choose_device


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a function that makes this a machine with so many GPUs, of which torch sees so many."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device_module, "NVIDIA_DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()

    def make(gpus: int, seen: int, **environment: str) -> None:
        for number in range(gpus):
            (tmp_path / f"nvidia{number}").touch()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    ("gpus", "seen", "environment", "expected"),
    [
        (0, 0, {}, "cpu"),
        (0, 0, {"LOCAL_RANK": "3"}, "cpu"),
        (8, 8, {}, "cuda:0"),
        (8, 8, {"LOCAL_RANK": "3"}, "cuda:3"),
        (8, 8, {"LOCAL_RANK": "3", "DS_ACCELERATOR": "cuda"}, "cuda:3"),
        (8, 1, {"LOCAL_RANK": "3"}, "cuda:0"),
        (8, 8, {"LOCAL_RANK": "3", "DS_ACCELERATOR": "cpu"}, "cpu"),
        (8, 0, {"DS_ACCELERATOR": "cpu"}, "cpu"),
        (8, 0, {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
    ],
)
def test_the_device(
    machine: Callable[..., None], gpus: int, seen: int, environment: dict[str, str], expected: str
) -> None:
    machine(gpus, seen, **environment)
    assert choose_device() == torch.device(expected)


@pytest.mark.parametrize(
    ("gpus", "seen", "environment", "message"),
    [
        (2, 0, {}, r"has 2 GPUs, and torch .* can use none\. .* driver.* DS_ACCELERATOR=cpu"),
        (2, 0, {"CUDA_VISIBLE_DEVICES": "0,1"}, "can use none"),
        (0, 0, {"DS_ACCELERATOR": "cuda"}, "has no GPUs"),
        (2, 2, {"LOCAL_RANK": "2"}, "more processes than the 2 GPUs"),
    ],
)
def test_gpus_that_cannot_be_used_are_an_error(
    machine: Callable[..., None], gpus: int, seen: int, environment: dict[str, str], message: str
) -> None:
    machine(gpus, seen, **environment)
    with pytest.raises(UserError, match=message):
        choose_device()
