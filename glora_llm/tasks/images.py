"""Images: bytes of pixels, an image classifier, loss and accuracy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glora_llm.atomic import cache_root
from glora_llm.data.augment import augmentation
from glora_llm.data.image_store import ImageSet
from glora_llm.data.images import PreparedImages, prepare_images
from glora_llm.data.report import ImageReport
from glora_llm.errors import UserError
from glora_llm.models.classifier import check_patches, from_data, with_head
from glora_llm.models.folder import new_config, new_folder
from glora_llm.models.resolve import ResolvedModel, resolve
from glora_llm.schema import ImagesSection, Recipe
from glora_llm.tasks.metrics import CLASS_METRICS, scores_of, wanted_metrics
from glora_llm.tasks.task import OnPreparedData
from glora_llm.training.batch import Batch
from glora_llm.training.image_objective import TOP, ImageObjective

MOST_COMPARED = 256  # images by which a merged model is compared
COMPARED_AT_ONCE = 64  # a model that is read layer by layer is read once for each batch
AUGMENTATION = 43  # stream of the seeds by which training images are varied


@dataclass(frozen=True)
class ImageTask(OnPreparedData[ImageSet, ImageReport]):
    """An image classifier on prepared images. See `tasks.task.Task` for what the methods are for.

    Args:
        metrics: further scores.
    """

    recipe: Recipe
    data: PreparedImages
    metrics: tuple[str, ...] = ()
    unit: str = "patches"
    scored: str = "images"
    causal: bool = False

    @property
    def settings(self) -> ImagesSection:
        """The recipe's section of images."""
        return self.recipe.data.images or ImagesSection()

    def batch(self, rows: ImageSet, indices: list[int]) -> Batch:
        """Return `pixels` (B, S, S, 3) uint8 and `labels` (B) int64."""
        found = [rows.row(index) for index in indices]
        pixels = torch.from_numpy(np.stack([row.pixels for row in found]))
        batch = {"pixels": pixels, "labels": torch.tensor([row.label for row in found])}
        if self.settings.own_classes and rows.role.partition("/")[0] == "test":
            batch["classes"] = torch.from_numpy(np.isin(np.arange(len(self.data.names)), rows.labels))
        return batch

    def training_batch(self, indices: list[int], step: int, place: int) -> Batch:
        """Return training images, and the seed of how they are varied: no state is carried to a restart."""
        key = [self.recipe.training.seed, AUGMENTATION, step, place]
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
        return self.batch(self.train, indices) | {"seed": seed}

    def targets(self, rows: ImageSet, index: int) -> int:
        """Return 1: every image counts the same."""
        return 1

    def objective(self, model: nn.Module) -> ImageObjective:
        """Return the summed cross entropy of the classes, over varied images in training."""
        vary = augmentation(self.settings, self.train.size, len(self.data.names))
        return ImageObjective(model, self.data.mean, self.data.std, vary)

    def means(self, table: Tensor, split: str) -> dict[str, float]:
        """Return loss and accuracy; of more than five classes, whether the right one is among the first five."""
        scores = {"loss": table[:, 0], "accuracy": table[:, 3]}
        if len(self.data.names) > TOP:
            scores["top5_accuracy"] = table[:, 4]
        means = {name: float(values.mean()) for name, values in scores.items()}
        further = scores_of(table, [name for name in self.metrics if name not in means])
        return {f"{split}/{name}": value for name, value in (means | further).items()}

    def comparison(self, rows: ImageSet, order: list[int]) -> tuple[list[Batch], int]:
        """Return up to 256 images in batches of 64, and how many they are."""
        chosen = order[:MOST_COMPARED]
        starts = range(0, len(chosen), COMPARED_AT_ONCE)
        return [self.batch(rows, chosen[start : start + COMPARED_AT_ONCE]) for start in starts], len(chosen)

    def answers(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits (B, C), and the loss of each image."""
        images = batch["pixels"].permute(0, 3, 1, 2).float() / 255
        logits = ImageObjective(model, self.data.mean, self.data.std).logits(images)
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return logits.cpu(), losses.cpu()

    def save_preprocessing(self, folder: Path) -> None:
        """Write preprocessor_config.json: size and scale, as transformers' image processor applies them."""
        from transformers import ViTImageProcessorPil

        size = {"height": self.train.size, "width": self.train.size}
        ViTImageProcessorPil(size=size, image_mean=self.data.mean, image_std=self.data.std).save_pretrained(folder)


def image_task(recipe: Recipe, weights: bool) -> tuple[ResolvedModel, ImageTask]:
    """Return the classifier of a recipe (a new one has no weights yet) and its task, with the data prepared.

    The data come first: they say how many classes the model has.

    Args:
        weights: False leaves the weights of a hub model where they are.

    Raises:
        UserError: for a model or data that do not fit the recipe, or each other.
    """
    section, seed = recipe.model, recipe.training.seed
    data = prepare_images(recipe.data, cache_root() / "data", seed)
    has = ["loss", *CLASS_METRICS, *(["top5_accuracy"] if len(data.names) > TOP else [])]
    task, size = ImageTask(recipe, data, wanted_metrics(recipe, has, "format images")), data.train.size
    if section.config is None:
        return with_head(resolve(section, weights, "images"), data.names, size, seed, weights), task
    if section.tokenizer is not None:
        raise UserError(
            "model.tokenizer belongs to text, and data.format is images: model.tokenizer=null takes it away."
        )
    config = new_config(section, "images", from_data(section.config, data.names, size))
    check_patches(getattr(config, "patch_size", None), size)
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"model.config: hidden_size {config.hidden_size} is no multiple of num_attention_heads "
            f"{config.num_attention_heads}, so heads have no whole width."
        )
    identity = f"{data.mean} {data.std}"
    folder, key = new_folder(config, recipe.vlora, seed, identity, task.save_preprocessing)
    return ResolvedModel(folder, f"a new {config.model_type}", None, key), task
