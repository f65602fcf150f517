"""What varies training images: that it does, within bounds, by the seed alone, and that labels follow the pixels."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from glora_llm.data.augment import augmentation, smoothed
from glora_llm.schema import ImagesSection

IMAGES = torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 4
EVERYTHING: dict[str, Any] = {
    "crop_padding": 2, "flip": True, "randaugment": 2, "mixup": 0.4, "cutmix": 0.4, "label_smoothing": 0.1,
}  # fmt: skip


def varied(seed: int = 0, images: torch.Tensor = IMAGES, labels: torch.Tensor = LABELS, **keys: Any) -> Any:
    found = augmentation(ImagesSection(**keys), images.shape[-1], 4)
    assert found is not None
    torch.manual_seed(seed)
    return found(images, labels)


def test_nothing_is_done_unless_it_is_asked_for() -> None:
    assert augmentation(ImagesSection(size=8, mean=[0.5] * 3, std=[0.2] * 3, randaugment_magnitude=5), 8, 4) is None


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_part_changes_what_it_should(name: str) -> None:
    images, targets = varied(**{name: EVERYTHING[name]})
    assert images.shape == IMAGES.shape and targets.shape == (16, 4)
    assert images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(targets.sum(1), torch.ones(16))
    plain = torch.nn.functional.one_hot(LABELS, 4).float()
    assert torch.equal(images, IMAGES) == (name == "label_smoothing")
    assert torch.equal(targets, plain) == (name in ("crop_padding", "flip", "randaugment"))
    different = (images != IMAGES).flatten(1).any(1)
    assert name != "flip" or 0 < different.sum() < 16
    assert name not in ("mixup", "cutmix") or 0 < different.sum() < 16


def test_the_seed_of_torch_decides_alone_and_whatever_was_drawn_before() -> None:
    first = varied(3, **EVERYTHING)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002 - the global one is what must not count
    varied(5, **EVERYTHING)
    again, other = varied(3, **EVERYTHING), varied(4, **EVERYTHING)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_second_micro_batch_draws_other_numbers() -> None:
    found = augmentation(ImagesSection(**EVERYTHING), 12, 4)
    assert found is not None
    torch.manual_seed(0)
    assert not torch.equal(found(IMAGES, LABELS)[0], found(IMAGES, LABELS)[0])


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_the_label_says_how_much_of_each_image_is_there(name: str) -> None:
    """Images of one brightness by class, 0 or 1: the mean of a mixed one is the share of class 1."""
    labels = torch.arange(64) % 2
    images = labels.float()[:, None, None, None].expand(64, 3, 20, 20).clone()
    got, targets = varied(1, images, labels, **{name: 1.0})
    torch.testing.assert_close(got.mean((1, 2, 3)), targets[:, 1], atol=1e-5, rtol=0)
    mixed = (targets.max(1).values < 0.999).sum()
    assert mixed > 10, "the draw mixed unlike images"


def test_an_image_takes_part_in_one_mixture_at_most() -> None:
    """Blends of 0 and 1 are grey in mixup and sharp in cutmix; none is both."""
    labels = torch.arange(256) % 2
    images = labels.float()[:, None, None, None].expand(256, 3, 12, 12).clone()
    got, targets = varied(2, images, labels, mixup=0.5, cutmix=0.25)
    torch.testing.assert_close(got.mean((1, 2, 3)), targets[:, 1], atol=1e-5, rtol=0)
    grey = ((got > 0.001) & (got < 0.999)).flatten(1)
    assert all(all_of == any_of for all_of, any_of in zip(grey.all(1).tolist(), grey.any(1).tolist(), strict=True))
    sharp = ~grey.any(1) & (targets.max(1).values < 0.999)
    assert 30 < grey.any(1).sum() < 100 and 10 < sharp.sum() < 60


def test_smoothing_is_its_formula() -> None:
    got = smoothed(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 0.2)
    torch.testing.assert_close(got, torch.tensor([[0.85, 0.05, 0.05, 0.05]]))
    targets = varied(label_smoothing=0.2)[1]
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    ours = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torchs = torch.nn.functional.cross_entropy(logits, LABELS, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(ours, torchs)


def test_a_batch_of_one_image_is_varied_too() -> None:
    images, targets = varied(0, IMAGES[:1], LABELS[:1], **EVERYTHING)
    assert images.shape == (1, 3, 12, 12) and targets.shape == (1, 4)
