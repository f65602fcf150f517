"""Augment training images at random with kornia: crop, flip, RandAugment, mixup, cutmix. Labels become soft.

Every random number comes from torch's default generator on the CPU, which the objective seeds for each micro batch: a
resumed run draws the same, on any device.

Letters: B images, C classes, S side in pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.schema import ImagesSection

GROUPS = 8  # RandAugment draws its operations once a group: kornia applies one choice to a whole batch


class Augment(nn.Module):
    """Varies images and labels as the recipe says. It has no parameters and no state.

    Args:
        settings: what to do.
        size: S.
        classes: C.
    """

    def __init__(self, settings: ImagesSection, size: int, classes: int):
        super().__init__()
        self.settings, self.classes = settings, classes
        self._single = nn.Sequential(*_single(settings, size))
        self._policy = _rand_augment(settings)
        self._mixup, self._cutmix = _mixers(settings)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return augmented images and their targets.

        Args:
            images: (B, 3, S, S), 0 to 1.
            labels: (B) int64.

        Returns:
            images (B, 3, S, S), 0 to 1, and the share of each class in each of them, (B, C), smoothed.
        """
        images = self._single(images)
        if self._policy is not None:
            groups = images.chunk(min(GROUPS, len(images)))
            images = torch.cat([self._policy(group) for group in groups]).clamp(0, 1)
        images, targets = self._mix(images, labels)
        return images, smoothed(targets, self.settings.label_smoothing)

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Let each image take part in mixup, in cutmix or in none, by one draw."""
        plain, targets = images, self._shares(labels)
        drawn, start = torch.rand(len(images)).to(images.device), 0.0
        for share, mix in ((self.settings.mixup, self._mixup), (self.settings.cutmix, self._cutmix)):
            if mix is None:
                continue
            mixed, mixture = mix(plain, labels)
            _, other, weight = mixture.reshape(len(images), 3).unbind(-1)
            weight = 1 - weight if mix is self._cutmix else weight  # kornia states the own image's share for cutmix
            chosen = (drawn >= start) & (drawn < start + share)
            blended = torch.lerp(self._shares(labels), self._shares(other), weight[:, None].float())
            images = torch.where(chosen[:, None, None, None], mixed, images)
            targets = torch.where(chosen[:, None], blended, targets)
            start += share
        return images, targets

    def _shares(self, labels: Tensor) -> Tensor:
        return nn.functional.one_hot(labels.long(), self.classes).float()


def smoothed(targets: Tensor, smoothing: float) -> Tensor:
    """Return (1 - e) targets + e / C: label smoothing (Szegedy et al., arXiv 1512.00567) of targets (B, C)."""
    return targets * (1 - smoothing) + smoothing / targets.shape[-1]


def augmentation(settings: ImagesSection, size: int, classes: int) -> Augment | None:
    """Return what varies training images, or None where the recipe asks for nothing."""
    shape = {"size", "mean", "std", "randaugment_magnitude"}
    fields = ImagesSection.model_fields
    asked = any(getattr(settings, name) != fields[name].default for name in fields.keys() - shape)
    return Augment(settings, size, classes) if asked else None


def _single(settings: ImagesSection, size: int) -> list[nn.Module]:
    """Return what is done to each image by itself; kornia is imported only where it is asked for."""
    found: list[nn.Module] = []
    if settings.crop_padding:
        found.append(_kornia().RandomCrop((size, size), padding=settings.crop_padding))
    if settings.flip:
        found.append(_kornia().RandomHorizontalFlip())
    return found


def _rand_augment(settings: ImagesSection) -> Any:
    """RandAugment (arXiv 1909.13719)."""
    if not settings.randaugment:
        return None
    return _kornia().auto.RandAugment(settings.randaugment, settings.randaugment_magnitude)


def _mixers(settings: ImagesSection) -> tuple[Any, Any]:
    """Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899), both with a weight drawn evenly from 0 to 1."""
    keys = ["input", "class"]
    mixup = _kornia().RandomMixUpV2(data_keys=keys) if settings.mixup else None
    cutmix = _kornia().RandomCutMixV2(data_keys=keys, use_correct_lambda=True) if settings.cutmix else None
    return mixup, cutmix


def _kornia() -> Any:
    import kornia.augmentation

    return kornia.augmentation
