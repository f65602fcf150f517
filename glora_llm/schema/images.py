"""The section `data.images`: size, scale and augmentation."""

from typing import Annotated

from pydantic import Field, model_validator

from glora_llm.schema.section import PositiveInt, Section, key


class ImagesSection(Section):
    """Format images: their size, their scale, and their augmentation in training (never in evaluation)."""

    size: PositiveInt | None = key(
        None, "side of the square that every image is resized to; none: they are squares of one size already", "pixels"
    )
    mean: list[float] | None = key(None, "of each channel, taken away; none: that of the training images", "0 to 1")
    std: list[Annotated[float, Field(gt=0)]] | None = key(
        None, "of each channel, divided by; none: that of the training images", "0 to 1"
    )
    crop_padding: Annotated[int, Field(ge=0)] = key(0, "pad by so much and cut a random square; 0: do not", "pixels")
    flip: bool = key(False, "mirror half of the images, left to right")
    randaugment: Annotated[int, Field(ge=0, le=10)] = key(0, "RandAugment: operations on each image; 0: none")
    randaugment_magnitude: Annotated[int, Field(ge=1, le=29)] = key(9, "RandAugment: their strength, of 30")
    mixup: Annotated[float, Field(ge=0, le=1)] = key(0.0, "share of images blended with another, labels too", "share")
    cutmix: Annotated[float, Field(ge=0, le=1)] = key(
        0.0, "share of images with a rectangle of another, labels too", "share"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0, "share of each target that is spread over all classes", "share"
    )
    own_classes: bool = key(
        False, "score each test set among the classes that occur in it, as papers do for ImageNet-A and ImageNet-R"
    )

    @model_validator(mode="after")
    def _fits(self) -> "ImagesSection":
        if self.mixup + self.cutmix > 1:
            raise ValueError(
                f"mixup {self.mixup} + cutmix {self.cutmix} is more than 1: an image takes part in one of them at most"
            )
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is not None and len(given) != 3:
                raise ValueError(f"{name} has {len(given)} numbers; expected 3: red, green and blue")
        return self
