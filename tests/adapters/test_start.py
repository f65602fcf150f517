"""An adapter folder as the start of a run: what is refused, early and in one message, and AdaLoRA's pruned ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm import recipe as recipes
from glora_llm.adapters.inject import inject
from glora_llm.adapters.start import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from glora_llm.adapters.weights import load_start, trainables
from glora_llm.cli import main
from glora_llm.errors import UserError
from glora_llm.models.load import meta_model
from glora_llm.plan.plan import make_plan
from glora_llm.schema import AdapterSection

LORA = ["adapter.method=lora", "adapter.slots=null"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the recipe tiny_cpu as PEFT saves them, untrained: glora/, lora/."""
    out = tmp_path_factory.mktemp("adapters")
    for name, more in (("glora", []), ("lora", LORA)):
        recipe = recipes.load("tiny_cpu", more)
        model = inject(meta_model(recipe.model, make_plan(recipe).base.folder), recipe.adapter, 0, 1)
        model.to_empty(device="cpu")
        model.save_pretrained(str(out / name))
    return out


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    out = tmp_path / "run"
    assert main(["train", "--recipe", "tiny_cpu", f"output.dir={out}", *arguments]) == 2
    assert not out.exists()
    message = capsys.readouterr().err
    assert message.count("adapter.weights") == 1
    return message


def _no_weights(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).unlink()


def _one_level_up(folder: Path) -> None:
    shutil.copytree(folder, folder / "adapter")
    (folder / ADAPTER_WEIGHTS).unlink()


def _pickle(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")


def _no_json(folder: Path) -> None:
    (folder / ADAPTER_CONFIG).write_text("{")


def _no_safetensors(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).write_text("nothing")


def _one_missing(folder: Path) -> None:
    weights = load_file(folder / ADAPTER_WEIGHTS)
    del weights[next(name for name in weights if "q_proj" in name)]
    save_file(weights, folder / ADAPTER_WEIGHTS)


def _one_too_many(folder: Path) -> None:
    save_file(load_file(folder / ADAPTER_WEIGHTS) | {"nowhere": torch.zeros(1)}, folder / ADAPTER_WEIGHTS)


def _rewritten_base(folder: Path) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (_no_weights, f"holds no {ADAPTER_WEIGHTS}."),
    "the run's folder": (_one_level_up, "Did you mean "),
    "a pickle": (_pickle, "is a pickle, which is not read"),
    "a broken configuration": (_no_json, "is not valid JSON"),
    "another file": (_no_safetensors, "is no safetensors file"),
    "a weight is missing": (_one_missing, "is missing in"),
    "a weight too many": (_one_too_many, "has nowhere, which this adapter has not"),
    "of a base that pissa changed": (_rewritten_base, "began with init_lora_weights pissa_niter_4"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_is_no_start(
    case: str, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said = WRONG[case]
    folder = tmp_path / "start"
    shutil.copytree(adapters / "lora", folder)
    damage(folder)
    assert said in refused(tmp_path, capsys, *LORA, f"adapter.weights={folder}")


def test_a_file_is_no_folder(adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = adapters / "lora" / ADAPTER_WEIGHTS
    assert "is no folder" in refused(tmp_path, capsys, *LORA, f"adapter.weights={file}")


@pytest.mark.parametrize(
    ("start", "arguments", "said"),
    [
        ("lora", ["adapter.alpha=3", *LORA], "with lora_alpha 8.0, and this recipe has 3.0"),
        ("lora", ["adapter.rank=2", *LORA], "with r 4, and this recipe has 2"),
        ("lora", ["adapter.method=rslora", "adapter.slots=null"], "Set adapter.method to what it was trained with"),
        ("lora", [], "with peft_type LORA, and this recipe has GLORA_LLM"),
        ("glora", ["adapter.composition=hadamard"], "with composition product, and this recipe has hadamard"),
        ("glora", ["adapter.slots={B: lora, E: vector}"], "Set adapter.slots to what it was trained with"),
        ("glora", ["adapter.targets=[q_proj]"], "which this adapter has not"),
        ("glora", ["adapter.modules_to_save=[lm_head]"], "lm_head.weight is missing"),
    ],
)
def test_weights_that_would_be_another_function(
    start: str, arguments: list[str], said: str, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(tmp_path, capsys, *arguments, f"adapter.weights={adapters / start}")


def _tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()


def test_pruned_ranks_of_adalora_begin_as_zero(tmp_path: Path) -> None:
    """The function is that of the saved adapter, while all ranks are there to be trained again."""
    section = AdapterSection(method="adalora", rank=4, targets=["q_proj", "down_proj"])
    first: Any = inject(_tiny(), section, seed=1, steps=10)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        pattern = {}
        for number, (name, parameter) in enumerate((n, p) for n, p in first.named_parameters() if ".lora_E" in n):
            kept = torch.arange(6) % 3 != number  # of 6 ranks 4 are left
            parameter[~kept] = 0
            pattern[name.removeprefix("base_model.model.")] = kept.tolist()
        ids = torch.arange(12).reshape(2, 6)
        expected = first.eval()(input_ids=ids).logits
    first.peft_config["default"].rank_pattern = pattern
    first.save_pretrained(str(tmp_path))
    assert {value.shape[0] for name, value in load_file(tmp_path / ADAPTER_WEIGHTS).items() if "lora_A" in name} == {4}

    second: Any = inject(_tiny(), section, seed=3, steps=10)
    load_start(second, trainables(second, section, 1.0), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(second.eval()(input_ids=ids).logits, expected)
    assert all(p.shape[0] == 6 for name, p in second.named_parameters() if "lora_A" in name)
    smaller: Any = inject(_tiny(), section.model_copy(update={"rank": 2}), seed=3, steps=10)
    with pytest.raises(UserError, match="with init_r 6, and this recipe has 3"):
        load_start(smaller, trainables(smaller, section, 1.0), tmp_path)


def test_an_adapter_of_peft_itself(tmp_path: Path) -> None:
    """AdaLoRA as PEFT saves it before anything was pruned."""
    torch.manual_seed(4)
    config = AdaLoraConfig(init_r=6, r=4, target_r=4, lora_alpha=16, target_modules=["q_proj"], total_step=5)
    get_peft_model(_tiny(), config).save_pretrained(str(tmp_path))
    section = AdapterSection(method="adalora", rank=4, targets=["q_proj"])
    model: Any = inject(_tiny(), section, seed=3, steps=10)
    load_start(model, trainables(model, section, 1.0), tmp_path)
    saved = load_file(tmp_path / ADAPTER_WEIGHTS)
    name = next(name for name in saved if "lora_A" in name)
    assert torch.equal(model.state_dict()[f"{name}.default"], saved[name])
