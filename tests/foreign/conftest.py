"""A LLaMA with biases in float64 on disk, and adapters of other packages on it, with seeded values."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import glora_llm.glora  # noqa: F401 - registers the method with PEFT
from glora_llm.cli import main
from glora_llm.models.resolve import ResolvedModel

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 3], [1, 90, 91, 92, 93, 94, 95, 3]])
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
Save = Callable[..., tuple[Path, Tensor]]


@pytest.fixture(scope="session")
def biased(tiny: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaMA whose linears have biases."""
    folder = tmp_path_factory.mktemp("base") / "biased"
    config = AutoConfig.from_pretrained(tiny.folder)
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    seed_values(model, lambda name: name.endswith("bias"))
    model.save_pretrained(folder)
    for name in TOKENIZER:
        if (tiny.folder / name).is_file():
            shutil.copy(tiny.folder / name, folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def seed_values(model: nn.Module, chosen: Callable[[str], bool], around: float = 0.0) -> None:
    """Give parameters float32 values, so that nothing is rounded when they are saved."""
    generator = torch.Generator().manual_seed(1)
    found = [parameter for name, parameter in model.named_parameters() if chosen(name)]
    assert found
    with torch.no_grad():
        for parameter in found:
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture
def peft_folder(tmp_path: Path) -> Save:
    """Return what makes and saves an adapter of PEFT, and returns its folder and what it computes, in float64."""

    def save(base: Path, config: Any, around: float = 0.0) -> tuple[Path, Tensor]:
        config.base_model_name_or_path = str(base)
        model = get_peft_model(load(base), config).eval()
        seed_values(model, lambda name: any(mark in name for mark in ("lora_", "hira_", "ia3_", "glora_")), around)
        model.double()
        model.save_pretrained(str(tmp_path / "theirs"))
        return tmp_path / "theirs", logits(model)

    return save


def imported(folder: Path, out: Path, *options: str) -> Any:
    """Import by the command line, and return the imported adapter on its base, in float64, through PEFT's loader."""
    assert main(["import", str(folder), "--out", str(out), *options]) == 0
    base = Path(str(load_config(out)["name"]))
    return PeftModel.from_pretrained(load(base), str(out / "adapter")).double().eval()


def load_config(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "base.json").read_text())
    return found


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield
