"""Runs that look trained: the adapter of a recipe on the tiny LLaMA with seeded values, saved as a run saves it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glora_llm import recipe as recipes
from glora_llm.adapters.inject import inject
from glora_llm.adapters.weights import save_adapter
from glora_llm.evaluation.trained import load_adapted
from glora_llm.merge.sample import keep_sample
from glora_llm.models.load import load_base
from glora_llm.plan.plan import Plan, make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.claim import base_identity
from glora_llm.schema import Recipe
from tests.written_records import write_questions

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 3], [1, 90, 91, 92, 93, 94, 95, 3]])
ALL_MODES = {"A": "lora", "B": "lora", "C": "vector", "E": "vector"}


@dataclass
class Trained:
    """A run folder, what it was made from, and what the adapter computes."""

    folder: RunFolder
    plan: Plan
    state: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, json.loads((self.folder.path / "base.json").read_text())["dtype"])
        return found

    def logits(self) -> Tensor:
        """What the unmerged model says, loaded from disk."""
        return logits(load_adapted(self.plan, self.folder.adapter))


Train = Callable[..., Trained]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS.to(model.device)).logits.float().cpu()
    return found


@pytest.fixture
def here(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of the fixture `device`, which commands choose too."""
    monkeypatch.setenv("DS_ACCELERATOR", device.type)
    monkeypatch.setenv("LOCAL_RANK", "0")
    return device


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty questions and answers."""
    return write_questions(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def make_recipe(samples: Path) -> Callable[..., Recipe]:
    def build(folder: Path, adapter: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
        data = {"format": "prompt_completion", "source": str(samples), "validation": 4, "max_tokens": 64}
        training = {"global_batch": 2, "micro_batch": 1, "steps": 10, "lr": 1e-3}
        return Recipe.model_validate(
            {
                "model": {"name_or_path": "embedded:tiny-llama", **sections.get("model", {})},
                "adapter": {"rank": 2, "alpha": 4.0, **adapter},
                "data": data | sections.get("data", {}),
                "training": training | sections.get("training", {}),
                "merge": {"dtype": "float32", **sections.get("merge", {})},
                "output": {"dir": str(folder)},
            }
        )

    return build


@pytest.fixture(scope="session")
def train(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return what makes a run with an adapter that no optimizer has seen."""

    def run(std: float = 0.1, **keys: Any) -> Trained:
        sections = {name: keys.pop(name) for name in ("model", "merge", "data", "training") if name in keys}
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        recipe = make_recipe(folder.path, keys, **sections)
        plan = make_plan(recipe, world_size=1)
        folder.write("recipe.yaml", recipes.dump(recipe))
        folder.write("base.json", json.dumps(base_identity(plan, CPU)))
        model = inject(load_base(recipe.model, plan.base.folder, CPU), recipe.adapter, seed=0, steps=plan.steps)
        state = _seeded(model, std)
        save_adapter(model, state, folder.adapter, str(plan.base.folder))
        keep_sample(plan, folder)
        return Trained(folder, plan, state)

    return run


def _seeded(model: torch.nn.Module, std: float) -> dict[str, Tensor]:
    """Move everything trained by seeded normal values; return it by the names of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            step = std * torch.randn(parameter.shape, generator=generator)
            state[f"master/{name}"] = parameter.detach() + step
    assert state
    return state
