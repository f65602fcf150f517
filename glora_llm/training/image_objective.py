"""The loss of images: the summed cross entropy of each image's class, soft targets included.

Letters: B images, C classes, S side in pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.training.batch import Batch
from glora_llm.training.objectives import TokenScores

TOP = 5
Vary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ImageObjective(nn.Module):
    """Wraps an image classifier for the engine: batch -> summed loss over its images.

    Pixels arrive as bytes and are scaled on the device; they are varied in training alone, never where they are scored.

    Args:
        model: a transformers image classifier: `pixel_values` (B, 3, S, S) -> `logits` (B, C).
        mean, std: of red, green and blue, 0 to 1.
        vary: (images (B, 3, S, S), labels (B)) -> (images, targets (B, C)), in training; None: nothing.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], vary: Vary | None = None):
        super().__init__()
        self.model, self.vary = model, vary
        # Plain attributes: a buffer would be cast to the model's dtype by DeepSpeed.
        self.scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def forward(
        self,
        pixels: Tensor,
        labels: Tensor,
        seed: int | None = None,
        score: bool = False,
        classes: Tensor | None = None,
    ) -> Tensor | TokenScores:
        """Return the sum of -log p over the images, a float32 scalar; or, to `score`, the scores of each.

        Args:
            pixels: (B, S, S, 3) uint8.
            labels: (B) int64.
            seed: of all that is random in how these images are varied; None: torch's generator as it is.
            classes: (C) bool, those that an answer may be where images are scored; None: all.
        """
        images = pixels.permute(0, 3, 1, 2).float() / 255
        if score:
            logits = self.logits(images)
            return scores(logits if classes is None else logits.masked_fill(~classes, -torch.inf), labels)
        targets = labels
        if self.vary is not None and self.training:
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.default_generator.manual_seed(seed)
                images, targets = self.vary(images, labels)
        return nn.functional.cross_entropy(self.logits(images), targets, reduction="sum")

    def targets(self, batch: Batch) -> int:
        """Return the number of images."""
        return len(batch["labels"])

    def extent(self, batch: Batch) -> tuple[int, int]:
        """Return the patches of a batch, and those of an image: what attends to each other, but for one class token."""
        patches = patches_of(self.model.config, batch["pixels"].shape[1])
        return len(batch["labels"]) * patches, patches

    def logits(self, images: Tensor) -> Tensor:
        """Return float32 logits (B, C) of images (B, 3, S, S), 0 to 1."""
        mean, std = (part.to(images.device) for part in self.scale)
        dtype = next(value.dtype for value in self.model.parameters() if value.is_floating_point())
        return self.model(pixel_values=((images - mean) / std).to(dtype)).logits.float()


def patches_of(config: Any, size: int) -> int:
    """Return the patches that a model cuts an image into, size in pixels; 1: it does not cut images into squares."""
    patch = getattr(config, "patch_size", None)
    return (size // patch) ** 2 if isinstance(patch, int) else 1


def scores(logits: Tensor, labels: Tensor) -> TokenScores:
    """Return the scores of logits (B, C) for labels (B); `among_labels`: the class is among the five most likely."""
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    first = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
    best = first == labels[:, None]
    rows = torch.arange(len(labels), device=labels.device)
    return TokenScores(rows, loss, best[:, 0], best.any(-1), first[:, 0], labels)
