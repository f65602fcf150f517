"""ZeRO 3 on a process group of one: a divided base goes through the engine as it is, and what is held is counted."""

from typing import Any

import pytest
import torch
from torch import nn

from glora_llm.adapters.inject import inject, without_adapter
from glora_llm.adapters.weights import trainables
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.models.sharded_load import Shards
from glora_llm.schema import AdapterSection, ModelSection, TrainingSection
from glora_llm.training.deepspeed_config import resolve_deepspeed_config
from glora_llm.training.engine import Engine
from glora_llm.training.objectives import CausalLMObjective
from glora_llm.training.sharding import Held, element_count, held, is_divided, set_whole, undivided
from tests.in_process import alone, group

__all__ = ["alone", "group"]
pytestmark = pytest.mark.usefixtures("group")
CPU = torch.device("cpu")
KEYS: dict[str, Any] = {"deepspeed": "zero3", "global_batch": 2, "micro_batch": 2, "steps": 10, "lr": 1e-3}
SETTINGS = TrainingSection(**KEYS)


def shards(dtype: torch.dtype) -> Shards:
    return Shards(resolve_deepspeed_config(SETTINGS, dtype, 1).values)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_engine_takes_a_divided_model_as_it_is(
    quantization: Any, tiny: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed neither moves nor casts it: adapters must be in the compute dtype before, buffers must stay exact."""
    dtype, moved = torch.bfloat16, []
    section = ModelSection(name_or_path="x", quantization=quantization, dtype="bfloat16")
    base = load_base(section, tiny.folder, CPU, shards(dtype))
    adapter = AdapterSection(rank=2, slots={"A": "lora", "C": "vector"})
    model = inject(base, adapter, 0, 10)
    objective = CausalLMObjective(without_adapter(model))
    to = nn.Module.to

    def spy(module: nn.Module, *arguments: Any, **more: Any) -> nn.Module:
        moved.append(module)
        return to(module, *arguments, **more)

    monkeypatch.setattr(nn.Module, "to", spy)
    config = resolve_deepspeed_config(SETTINGS, dtype, 1)
    engine = Engine(objective, trainables(model, adapter, 1.0), SETTINGS, config, CPU)
    assert objective not in moved
    assert all(is_divided(parameter) for parameter in objective.parameters())
    assert {parameter.dtype for parameter in objective.parameters()} == {dtype}
    buffers = [buffer for buffer in objective.buffers() if buffer.is_floating_point()]
    assert buffers and {buffer.dtype for buffer in buffers} == {torch.float32}
    found = engine.held()
    assert found.parameters == found.total == 2 * sum(element_count(p) for p in objective.parameters())
    assert (found.scales > 0) == (quantization == "nf4")
    engine.close()


def test_scales_are_counted_once_and_for_int8_too(tiny: ResolvedModel) -> None:
    bases = {
        name: held(load_base(ModelSection(name_or_path="x", quantization=name), tiny.folder, CPU))  # type: ignore[arg-type]
        for name in ("none", "nf4", "int8")
    }
    linears = 2 * 7
    assert bases["none"].scales == 0
    rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)  # of the linears of two layers
    assert bases["int8"].scales == 4 * rows
    blocks = (bases["none"].total - bases["nf4"].total) / 3.5 / 64  # float32 became half a byte, in blocks of 64
    second = linears * 4  # one scale in float32 for up to 256 scales in 8 bits; these matrices have at most 128
    assert blocks + second <= bases["nf4"].scales <= blocks + second + linears * 4 + 4 * (16 + 256) * linears


def test_a_divided_parameter_is_set_whole() -> None:
    parameter, values = nn.Parameter(torch.zeros(3, 5)), torch.randn(3, 5)
    shards(torch.float32).divide(parameter)
    set_whole(parameter, values)
    assert parameter.numel() == 0 and torch.equal(parameter.ds_tensor.view(3, 5), values)  # type: ignore[attr-defined]
    plain = nn.Parameter(torch.zeros(3, 5))
    set_whole(plain, values)
    assert torch.equal(plain, values)


@pytest.mark.parametrize(("held_bytes", "world_size", "said"), [(250, 4, False), (1000, 1, False), (1000, 4, True)])
def test_a_run_that_is_not_divided_is_told(held_bytes: int, world_size: int, said: bool) -> None:
    text = undivided(Held(parameters=held_bytes, scales=500, total=1000), world_size)
    assert bool(text) == said
