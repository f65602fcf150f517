"""The first module whose output is not finite, in a model as it is and in a compiled one."""

import pytest
import torch
from torch import nn

from glora_llm.training.diagnosis import first_bad_module


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_bad_module_is_named(compiled: bool) -> None:
    broken = nn.Linear(3, 3)
    layer = nn.Sequential(nn.Linear(3, 3), broken, nn.ReLU())
    model = nn.Sequential(layer, nn.Linear(3, 1))
    torch._dynamo.reset()
    if compiled:
        layer.compile(backend="aot_eager")
    x = torch.ones(2, 3)
    model(x)  # compiled before the hooks are there
    with torch.no_grad():
        broken.weight.fill_(float("nan"))
    assert first_bad_module(model, model, [x]) == "0.1"  # type: ignore[list-item]
    with torch.no_grad():
        broken.weight.zero_()
    assert first_bad_module(model, model, [x]).startswith("none")  # type: ignore[list-item]
