"""The predictor short_run: a structure by the gradients that last, from a short run that leaves nothing behind."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glora_llm.adapters.inject import adapted_layers, inject
from glora_llm.adapters.weights import trainables
from glora_llm.errors import UserError
from glora_llm.launch.ranks import Processes
from glora_llm.run.gradients import _of_layer, _probe, _train_briefly
from glora_llm.schema import AdapterSection, TrainingSection
from glora_llm.search.budget import check_short_run, short_steps
from glora_llm.search.predictors import PREDICTORS, LayerGradients
from glora_llm.training.deepspeed_config import resolve_deepspeed_config
from glora_llm.training.engine import Engine
from glora_llm.training.loop import NonFinite
from tests.in_process import alone, group, one_thread, train_in_process
from tests.run.test_train import overrides, write_rows

__all__ = ["alone", "group", "one_thread"]
WIDE, STEPS = 24, 8
SECTION = AdapterSection(
    rank=1, alpha=1, targets=["quick", "slow"], slots={"B": "lora"}, scaling="even", budget=1000, predictor="short_run",
    budget_rows=STEPS * 8,
)  # fmt: skip
TRAINING = TrainingSection.model_validate(
    {"global_batch": 8, "micro_batch": 4, "steps": 100, "lr": 0.1, "deepspeed": "zero0"}
)


class QuickAndSlow(nn.Module):
    """Two linears. What `quick` has to learn is steep and over after one step; `slow` has a long way to go."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quick, self.slow = (nn.Linear(WIDE, WIDE, bias=False) for _ in range(2))
        for layer in (self.quick, self.slow):
            nn.init.normal_(layer.weight, std=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        quick, slow = self.quick(x).mean(-1), self.slow(x).mean(-1)
        return (10 * (0.01 - quick).clamp_min(0) + 3 * (100 - slow).clamp_min(0)).sum()

    def targets(self, batch: dict[str, Tensor]) -> int:
        return len(batch["x"])


def seen(by: str, broken: int | None = None) -> dict[str, LayerGradients]:
    """Return the gradients of both layers by a predictor's way; one micro batch may have an infinite input."""
    objective = QuickAndSlow()
    model = inject(objective, SECTION.model_copy(update={"budget": None}), 0, 100)
    objective.quick, objective.slow = model.base_model.model.quick, model.base_model.model.slow
    layers = adapted_layers(model)
    engine = Engine(
        objective, trainables(model, SECTION, 1.0), TRAINING, resolve_deepspeed_config(TRAINING, torch.float32, 1),
        torch.device("cpu"),
    )  # fmt: skip
    probe = _probe(SECTION, layers, 0)
    inputs = [{"x": 1 + 0.1 * torch.randn(4, WIDE, generator=torch.Generator().manual_seed(n))} for n in range(16)]
    if broken is not None:
        inputs[broken]["x"][0, 0] = float("inf")
    if by == "short_run":
        recipe = SimpleNamespace(adapter=SECTION, training=TRAINING)
        plan: Any = SimpleNamespace(
            recipe=recipe, steps=100, process_batches=lambda step, *_: inputs[2 * step : 2 * step + 2]
        )
        losses = _train_briefly(plan, probe, engine, Processes(0, 1, torch.device("cpu")))
        assert len(losses) == STEPS and losses[-1] < losses[0]
    else:
        for batch in inputs:
            probe.see(lambda batch=batch: engine.loss(batch), 0)  # type: ignore[misc]
    found = {name: _of_layer(probe, name, SECTION) for name in layers}
    engine.close()
    return found


def test_it_finds_the_layer_with_a_long_way_to_go(group: None) -> None:
    """All that `quick` can lower the loss by is 0.1, and the first step's gradient prefers it; a short run does not."""
    worth = {}
    for name in ("first_step", "short_run"):
        layers, predictor = seen(name), PREDICTORS.get(name)
        worth[name] = {layer: float(predictor(found, "B", "lora")[0]) for layer, found in layers.items()}
    assert worth["first_step"]["quick"] > 3 * worth["first_step"]["slow"] > 0
    assert worth["short_run"]["slow"] > 2 * worth["short_run"]["quick"] > 0
    assert worth["first_step"]["slow"] / 64 == pytest.approx(worth["short_run"]["slow"], rel=1e-3), "sum and mean"


def test_a_short_run_that_diverges_ends_as_a_run_that_does(group: None) -> None:
    """So a comparison goes on with its other rates, as it does where a run itself diverges."""
    with pytest.raises(NonFinite, match=r"Step 2 of 8 of .*short_run had a loss or gradient that is not finite"):
        seen("short_run", broken=3)


@pytest.mark.parametrize(
    ("rows", "steps", "batch", "expected"), [(None, 75, 16, 4), (None, 1000, 16, 50), (64, 75, 16, 4), (1, 75, 4, 8)]
)
def test_a_short_run_is_a_share_of_the_run(rows: int | None, steps: int, batch: int, expected: int) -> None:
    assert short_steps(AdapterSection(budget_rows=rows, budget=1000), steps, batch) == expected


def test_float16_is_refused() -> None:
    with pytest.raises(UserError, match="those of float16 overflow in the first steps"):
        check_short_run(SECTION, 100, 8, is_float16=True)
    check_short_run(SECTION.model_copy(update={"predictor": "agreement"}), 100, 8, is_float16=True)


RUN = [
    "adapter.slots=null", "adapter.scaling=even", "training.lr=auto", "adapter.budget=4000", "training.steps=8",
    "adapter.predictor=short_run", "adapter.budget_rows=32", "model.quantization=nf4", "output.stop_after=1",
]  # fmt: skip


def test_a_run_begins_anew_after_it(tmp_path: Path) -> None:
    """Twice the same, with and without gradient checkpointing; the run's first loss is the base's again."""
    found = []
    for name, checkpointing in (("one", "false"), ("two", "true")):
        settings = overrides(write_rows(tmp_path / "data.jsonl", 80), tmp_path / name)
        assert train_in_process("tiny_cpu", *settings, *RUN, f"model.gradient_checkpointing={checkpointing}") == 75
        found.append(tmp_path / name)
    choice, again = (json.loads((run / "structure" / "choice.json").read_text()) for run in found)
    assert choice["samples"] == 32 and len(choice["losses"]) == 2 and choice["losses"][1] < choice["losses"][0]
    assert 3000 < choice["parameters"] <= 4000 and choice["seconds"] > 0
    assert again["losses"] == pytest.approx(choice["losses"], rel=1e-5)
    assert (found[0] / "genome.json").read_text() == (found[1] / "genome.json").read_text()
    lines = [json.loads(line) for line in (found[0] / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["train/loss"] == pytest.approx(choice["losses"][0], rel=1e-6)


def test_a_run_that_is_short_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = overrides(write_rows(tmp_path / "data.jsonl", 80), tmp_path / "run")
    assert train_in_process("tiny_cpu", *settings, *RUN, "training.steps=7") == 2
    assert (
        "trains 2 steps before the run, of 32 samples, and the run has 7: expected 8 or more" in capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "recipe.yaml").exists()
