"""What a run asks of images: batches, seeds, scores, and what a merged folder says about its inputs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from glora_llm import recipe as recipes
from glora_llm.errors import UserError
from glora_llm.plan.overview import describe
from glora_llm.plan.plan import Plan, make_plan
from glora_llm.schema import ImagesSection
from glora_llm.tasks.images import ImageTask
from glora_llm.training.image_objective import ImageObjective

ROWS = ["data.max_rows=64", "data.max_test_rows=32", "data.validation=16"]


@pytest.fixture(scope="module")
def plan(cache: Path) -> Plan:
    more = ["data.images={crop_padding: 2, flip: true, mixup: 0.5, randaugment: 2}", "training.global_batch=32",
            "training.micro_batch=8"]  # fmt: skip
    return make_plan(recipes.load("vit_cifar10_vlora_tiny", [*ROWS, *more]))


def task_of(plan: Plan) -> ImageTask:
    assert isinstance(plan.task, ImageTask)
    return plan.task


def test_a_batch_holds_pixels_and_labels(plan: Plan) -> None:
    task = task_of(plan)
    batch = task.batch(task.train, [3, 5])
    assert batch["pixels"].shape == (2, 16, 16, 3) and batch["pixels"].dtype == torch.uint8
    assert batch["labels"].tolist() == [task.train.row(3).label, task.train.row(5).label]
    assert np.array_equal(batch["pixels"][1].numpy(), task.train.row(5).pixels)


def test_ranks_share_images_and_seeds_of_a_step(plan: Plan) -> None:
    """Any number of ranks gives the same micro batches with the same seeds, so images are varied in the same way."""
    found = []
    for world in (1, 2, 4):
        batches = [batch for rank in range(world) for batch in plan.process_batches(3, rank, world)]
        found.append({batch["seed"]: batch["labels"].tolist() for batch in batches})
    assert found[0] == found[1] == found[2] and len(found[0]) == 4
    assert not found[0].keys() & {batch["seed"] for batch in plan.process_batches(4, 0, 1)}


def test_the_means_of_a_table(plan: Plan) -> None:
    table = torch.tensor([[2.0, 1, 1, 1, 1], [4.0, 1, 0, 0, 1], [3.0, 1, 0, 0, 0]], dtype=torch.float64)
    expected = {"test/loss": 3.0, "test/accuracy": 1 / 3, "test/top5_accuracy": 2 / 3}
    assert task_of(plan).means(table, "test") == pytest.approx(expected)


def test_a_test_set_scored_among_its_own_classes(plan: Plan) -> None:
    """Loss, answer and first five are those of a head that has the set's classes alone."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8, num_labels=6)).eval()
    pixels, labels = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8), torch.tensor([1, 4, 4, 1, 1])
    with torch.no_grad():
        objective = ImageObjective(model, [0.5] * 3, [0.5] * 3)
        found = objective(pixels, labels, score=True, classes=torch.arange(6) % 3 == 1)
        of_two = model((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).logits[:, [1, 4]]
    loss = torch.nn.functional.cross_entropy(of_two, (labels == 4).long(), reduction="none")
    assert torch.allclose(found.loss, loss, atol=1e-6)
    assert torch.equal(found.predicted, torch.tensor([1, 4])[of_two.argmax(-1)]) and bool(found.among_labels.all())
    section = plan.recipe.data.model_copy(update={"images": ImagesSection(own_classes=True)})
    task = replace(task_of(plan), recipe=plan.recipe.model_copy(update={"data": section}))
    assert task.test is not None and "classes" not in task.batch(task.train, [0])
    assert task.batch(task.test, [0])["classes"].nonzero().flatten().tolist() == sorted(set(task.test.labels))


def test_few_classes_have_no_top_five() -> None:
    colours = make_plan(recipes.load("vit_cifar10_vlora_tiny", [*ROWS, "data.source=embedded:colours"]))
    assert set(task_of(colours).means(torch.ones(2, 5, dtype=torch.float64), "test")) == {"test/loss", "test/accuracy"}


def test_what_is_written_beside_a_model_does_to_a_picture_what_training_did(plan: Plan, tmp_path: Path) -> None:
    task = task_of(plan)
    task.save_preprocessing(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = task.train.row(0).pixels
    got = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    seen: list[torch.Tensor] = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values: torch.Tensor) -> object:
            seen.append(pixel_values)
            return type("Output", (), {"logits": torch.zeros(1, 6)})

    objective = ImageObjective(Model(), task.data.mean, task.data.std)
    objective(**task.batch(task.train, [0]), score=True)
    torch.testing.assert_close(seen[0], got, atol=1e-5, rtol=1e-5)


def test_a_new_model_has_the_names_of_the_classes_and_shares_its_layers(plan: Plan) -> None:
    names = {file.name for file in plan.base.folder.iterdir()}
    assert names == {"config.json", "start.json", "vlora.json", "preprocessor_config.json"}
    assert '"checks"' in (plan.base.folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.config.num_labels=10"], "model.config.num_labels is 10, and the data have 6 classes"),
        (["model.config.patch_size=5"], "patch size of 5 does not divide images of 16 x 16 pixels"),
        (["data.images.size=18"], "patch size of 4 does not divide images of 18 x 18 pixels"),
        (["model.config.model_type=llama"], "'llama' is a family of causal language models; expected one of image cl"),
        (["model.config.hiden_size=8"], "model.config.hiden_size: a vit has no such setting. Did you mean 'hidden_siz"),
        (["model.tokenizer=train:300"], "model.tokenizer belongs to text"),
        (["vlora.layers_per_compound=3"], "layers_per_compound is 3, which does not divide 8 layers"),
        (["vlora.rank=64"], "rank is 64 for 'attention.q_proj', whose smaller side is 48"),
        (["vlora.targets=[fc3]"], "Did you mean 'fc2'?"),
        (["model.config.hidden_size=50"], "model.config: hidden_size 50 is no multiple of num_attention_heads 4"),
    ],
)
def test_a_model_that_does_not_fit(more: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        describe(make_plan(recipes.load("vit_cifar10_vlora_tiny", [*ROWS, *more]), world_size=1))
    assert said in str(caught.value)
