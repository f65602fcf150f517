"""Image classifiers in this process: what is refused with exit code 2, and adapters on a ViT of our own."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from glora_llm.cli import main
from tests.in_process import alone, one_thread, train_in_process

__all__ = ["alone", "one_thread"]
SMALL = [
    "data.max_rows=128", "data.max_test_rows=32", "data.validation=32", "training.steps=3", "training.global_batch=16",
    "training.micro_batch=8", "training.warmup=0", "evaluation.every=null", "merge.after_training=false",
]  # fmt: skip
ON_TOP = [*SMALL, "data.source=embedded:colours", "data.images={flip: true}", "training.epochs=null"]
Outcome = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Iterator[Path]:
    """The run folder of a VLoRA ViT after three steps."""
    out = tmp_path_factory.mktemp("vit") / "run"
    assert train_in_process("vit_cifar10_vlora_tiny", *SMALL, f"output.dir={out}") == 0
    yield out


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Outcome:
    """Run a recipe that must be refused; return what was said."""

    def run(*more: str, recipe: str = "vit_cifar10_vlora_tiny") -> str:
        before = sorted(tmp_path.iterdir())
        assert train_in_process(recipe, f"output.dir={tmp_path / 'run'}", *more) == 2
        assert sorted(tmp_path.iterdir()) == before, "nothing is written"
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.source=absent/folder/images"], "There is no file "),
        (["data.source=embedded:shape"], "Did you mean 'shapes'?"),
        (["data.source=embedded:banking77"], "there is: shapes, colours"),
        (["data.images.mixup=1.5"], "data.images.mixup: got 1.5 (number), expected less than or equal to 1"),
        (["data.images.mixup=-0.1"], "data.images.mixup: got -0.1 (number), expected greater than or equal to 0"),
        (["data.images.mixup=0.7", "data.images.cutmix=0.7"], "mixup 0.7 + cutmix 0.7 is more than 1"),
        (["data.images.label_smoothing=1"], "data.images.label_smoothing: got 1 (integer), expected less than 1"),
        (["data.images.randaugment=20"], "data.images.randaugment: got 20 (integer), expected less than or equal to"),
        (["data.images.std=[0.5, 0.5]"], "std has 2 numbers; expected 3: red, green and blue"),
        (["data.images.flipp=true"], "unknown key 'data.images.flipp'. Did you mean 'flip'?"),
        (["data.packing=true"], "data.packing belongs to text, and data.format is images"),
        (["data.max_tokens=64"], "data.max_tokens belongs to text"),
        (["data.prompt='{text}'"], "data.prompt belongs to text"),
        (["model.config.patch_size=5"], "A patch size of 5 does not divide images of 16 x 16 pixels"),
        (["data.images.size=30"], "A patch size of 4 does not divide images of 30 x 30 pixels"),
        (["model.config.num_labels=10"], "model.config.num_labels is 10, and the data have 6 classes"),
        (["model.config={model_type: llama}", "model.tokenizer=null"], "expected one of image classifiers"),
        (["model.config=null", "model.name_or_path=embedded:tiny-llama", "vlora=null"], "which is no image classifier"),
        (["data.validation=validation"], "embedded:shapes has no split 'validation'; there is: train, test."),
        (["data.test=null", "evaluation.test_before=true"], "evaluation.test_before needs test rows"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)  # fmt: skip
def test_a_mistake_with_images(more: list[str], said: str, refused: Outcome) -> None:
    assert said in refused(*more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.format=classification", "data.max_tokens=64", "data.images=null"],
         "model.config.model_type 'vit' is a family of image classifiers; expected one of causal language models"),
        (["data.format=classification", "data.max_tokens=64"], "images belongs to format images, not to 'classificat"),
        (["data.format=classification", "data.images=null"], "max_tokens is 0; text needs 2 or more"),
    ],
)  # fmt: skip
def test_text_with_a_vit(more: list[str], said: str, refused: Outcome) -> None:
    assert said in refused("data.source=embedded:banking77", "data.validation=32", *more)


def test_images_with_a_text_model(refused: Outcome) -> None:
    message = refused("data.format=images", "data.source=embedded:shapes", "data.prompt=null", "data.max_tokens=0",
                      "data.overlong=error", "data.validation=8", recipe="tiny_cpu")  # fmt: skip
    assert "has model_type 'llama', which is no image classifier" in message


def test_a_search_by_label_words(refused: Outcome) -> None:
    message = refused("adapter.slots=null", "adapter.paths=sample", "search.metric=label_accuracy",
                      recipe="vit_cifar10_glora")  # fmt: skip
    assert "search.metric label_accuracy is of label words" in message


def test_sizes_that_differ_from_those_of_a_trained_model(trained: Path, refused: Outcome) -> None:
    message = refused(f"model.name_or_path={trained / 'model'}", "data.source=embedded:colours", "data.images.size=32",
                      recipe="vit_cifar10_glora")  # fmt: skip
    assert "takes images of 16 x 16 pixels, and these have 32 x 32: set data.images.size=16" in message


@pytest.mark.parametrize("method", ["glora", "lora"])
def test_an_adapter_on_a_vlora_vit_trains_and_merges(method: str, trained: Path, tmp_path: Path) -> None:
    """A new task of other classes: the head is new and trained in full, the body keeps its shared layers."""
    out = tmp_path / "run"
    slots = [] if method == "glora" else ["adapter.slots=null"]
    base = f"model.name_or_path={trained / 'model'}"
    kind = [f"adapter.method={method}", *slots]
    assert train_in_process("vit_cifar10_glora", base, *ON_TOP, *kind, f"output.dir={out}") == 0
    assert main(["merge", str(out), "--out", str(out / "merged")]) == 0
    report = json.loads((out / "merged" / "merge_report.json").read_text())
    assert report["max_abs_logit_diff"] < 1e-5 and report["tokens"] == 32
    plain = AutoModelForImageClassification.from_pretrained(out / "merged").eval()
    assert plain.config.id2label == {0: "red", 1: "green", 2: "blue", 3: "yellow"}
    before = AutoModelForImageClassification.from_pretrained(_merged(trained)).eval()
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = (plain.vit(pictures).last_hidden_state - before.vit(pictures).last_hidden_state).abs().max()
    assert moved > 1e-4, "the adapter is in it"
    names = set(json.loads((out / "adapter" / "adapter_config.json").read_text())["target_modules"])
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    assert "test/accuracy" in json.loads((out / "summary.json").read_text())["test_merged"]


def test_the_head_alone(trained: Path, tmp_path: Path) -> None:
    """GLoRA without a slot trains the new head and nothing else: a linear probe."""
    out = tmp_path / "run"
    more = [f"model.name_or_path={trained / 'model'}", "adapter.slots={A: none}", f"output.dir={out}"]
    assert train_in_process("vit_cifar10_glora", *ON_TOP, *more) == 0
    assert json.loads((out / "summary.json").read_text())["trained_parameters"] == 48 * 4 + 4
    assert main(["merge", str(out), "--out", str(out / "merged")]) == 0
    plain = AutoModelForImageClassification.from_pretrained(out / "merged").eval()
    before = AutoModelForImageClassification.from_pretrained(_merged(trained)).eval()
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            plain.vit(pictures).last_hidden_state, before.vit(pictures).last_hidden_state, atol=1e-5, rtol=0.0
        )


@pytest.mark.parametrize("stored", ["nf4", "int8"])
def test_an_adapter_on_a_quantised_vit_trains_and_merges(stored: str, trained: Path, tmp_path: Path) -> None:
    """The head is never quantised: it is trained in full."""
    out = tmp_path / "run"
    model = [f"model.name_or_path={_merged(trained)}", f"model.quantization={stored}", "training.deepspeed=zero2"]
    assert train_in_process("vit_cifar10_glora", *model, *ON_TOP, f"output.dir={out}") == 0
    assert main(["merge", str(out), "--out", str(out / "merged")]) == 0
    report = json.loads((out / "merged" / "merge_report.json").read_text())
    assert report["max_abs_logit_diff"] < (1e-5 if stored == "nf4" else 0.05)


def _merged(run: Path) -> Path:
    out = run / "merged"
    if not out.exists():
        assert main(["merge", str(run), "--out", str(out), "--dtype", "float32"]) == 0
    return out
