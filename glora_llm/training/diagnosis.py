"""Find the first module whose output is not finite."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from glora_llm.training.batch import Batch


def first_bad_module(model: nn.Module, score: Callable[[Batch], Any], batches: Sequence[Batch]) -> str:
    """Run batches again with a hook on every module; return the first whose output is not finite.

    All ranks must call it: all do the same forward passes.
    """
    bad: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not bool(output.isfinite().all()):
                bad.append(name)

        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled layer would not call hooks that came later
            for batch in batches:
                score(batch)
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else "none: the forward pass is finite, the gradient is not"
