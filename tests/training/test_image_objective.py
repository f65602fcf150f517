"""The loss of images against formulas, and that evaluation sees images as they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from glora_llm.data.augment import augmentation
from glora_llm.schema import ImagesSection
from glora_llm.training.image_objective import ImageObjective

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
PIXELS = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 6, 4, 5])


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=7, initializer_range=0.3)
    )


def normalised(pixels: Tensor) -> Tensor:
    channels = [(pixels[..., c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)]
    return torch.stack(channels, dim=1)


def test_the_loss_is_the_sum_over_images() -> None:
    model = vit()
    got = ImageObjective(model, MEAN, STD)(PIXELS, LABELS)
    logits = model(pixel_values=normalised(PIXELS)).logits
    torch.testing.assert_close(got, -logits.log_softmax(-1)[torch.arange(6), LABELS].sum())
    parts = sum(ImageObjective(model, MEAN, STD)(PIXELS[n : n + 1], LABELS[n : n + 1]) for n in range(6))
    torch.testing.assert_close(parts, got)


def test_soft_targets_weigh_the_classes() -> None:
    targets = torch.rand(6, 7, generator=torch.Generator().manual_seed(1)).softmax(-1)
    model = vit()
    got = ImageObjective(model, MEAN, STD, lambda images, labels: (images / 2, targets))(PIXELS, LABELS)
    halved = torch.as_tensor(PIXELS).permute(0, 3, 1, 2) / 255 / 2 - torch.tensor(MEAN)[:, None, None]
    logits = model(pixel_values=halved / torch.tensor(STD)[:, None, None]).logits
    torch.testing.assert_close(got, -(targets * logits.log_softmax(-1)).sum())


def test_scores_are_those_of_the_images_as_they_are() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values: Tensor) -> Any:
            logits = torch.tensor([[9, 5, 4, 3, 2, 1, 0]] * 6).float()
            return type("Output", (), {"logits": logits})

    found = ImageObjective(Table(), MEAN, STD)(PIXELS, LABELS, score=True)
    assert found.row.tolist() == list(range(6))
    assert found.correct.tolist() == [True] + [False] * 5
    assert found.among_labels.tolist() == [True, True, True, False, True, False]
    logits = torch.tensor([9.0, 5, 4, 3, 2, 1, 0])
    torch.testing.assert_close(found.loss, (logits.logsumexp(0) - logits[LABELS]))


@pytest.mark.parametrize("mode", ["scored", "in evaluation mode"])
def test_images_are_varied_in_training_alone(mode: str) -> None:
    def never(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("an image was varied")

    objective = ImageObjective(vit(), MEAN, STD, never)
    with pytest.raises(AssertionError, match="varied"):
        objective(PIXELS, LABELS)
    if mode == "scored":
        assert objective(PIXELS, LABELS, score=True).loss.shape == (6,)
    else:
        torch.testing.assert_close(objective.eval()(PIXELS, LABELS), ImageObjective(vit(), MEAN, STD)(PIXELS, LABELS))


def test_the_seed_of_a_batch_fixes_how_it_is_varied_and_leaves_the_generator_alone() -> None:
    settings = ImagesSection(crop_padding=2, flip=True, randaugment=2, mixup=0.5, cutmix=0.5)
    objective = ImageObjective(vit(), MEAN, STD, augmentation(settings, 8, 7))

    def loss(seed: int | None, drawn: int = 0) -> float:
        torch.rand(drawn)  # what an evaluation or an earlier step may have used up
        return float(objective(PIXELS, LABELS, seed).detach())

    assert loss(5) == loss(5, drawn=7) != loss(6)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    loss(5)
    assert torch.equal(torch.rand(3), expected)
    assert loss(None) != loss(None)


def test_a_batch_counts_its_images_and_patches() -> None:
    batch = {"pixels": PIXELS, "labels": LABELS}
    objective = ImageObjective(vit(), MEAN, STD)
    assert objective.targets(batch) == 6 and objective.extent(batch) == (24, 4)


def test_bfloat16_weights_get_their_dtype_and_give_a_float32_loss() -> None:
    model = vit()
    exact = ImageObjective(model, MEAN, STD)(PIXELS, LABELS)
    rough = ImageObjective(model.to(torch.bfloat16), MEAN, STD)(PIXELS, LABELS)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.1)
