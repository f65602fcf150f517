"""AdaLoRA (arXiv 2303.10512) asks two things of a training loop: an orthogonality penalty, a budget after each step.

PEFT computes both; here they are called at the right place, and what the allocator remembers goes into checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MEMORY = ("ipt", "exp_avg_ipt", "exp_avg_unc")
STATE, PATTERN = "adalora.safetensors", "adalora.json"


class RankAllocation:
    """The budget of one AdaLoRA model.

    Args:
        model: a PeftModel whose tuner is AdaLoRA.
    """

    def __init__(self, model: Any):
        self.tuner = model.base_model
        self.config = model.peft_config[self.tuner.trainable_adapter_name]
        self.step = 0

    def penalty(self) -> Tensor:
        """Return the weighted mean of |A A' - 1| and |B' B - 1| (Frobenius) over all factors, a scalar."""
        parts = []
        for layer in self.tuner.modules():
            if isinstance(getattr(layer, "lora_A", None), nn.ParameterDict):
                parts += [_distance(a @ a.T) for a in layer.lora_A.values()]
                parts += [_distance(b.T @ b) for b in layer.lora_B.values()]
        return float(self.config.orth_reg_weight) * torch.stack(parts).mean()

    def allocate(self, *_: Any) -> None:
        """Give the ranks to the layers that use them; called between the optimizer's step and zero_grad."""
        self.step += 1
        if any(p.requires_grad and p.grad is None for p in self.tuner.parameters()):
            return  # the step was skipped: its gradient was not finite
        self.tuner.update_and_allocate(self.step)

    def save(self, folder: Path) -> None:
        """Write what the allocator remembers."""
        allocator = self.tuner.rankallocator
        tensors = {f"{kind}/{name}": t.contiguous() for kind in MEMORY for name, t in getattr(allocator, kind).items()}
        save_file(tensors, folder / STATE)
        (folder / PATTERN).write_text(json.dumps({"step": self.step, "rank_pattern": self.config.rank_pattern or {}}))

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote."""
        for name, tensor in load_file(folder / STATE).items():
            kind, _, parameter = name.partition("/")
            getattr(self.tuner.rankallocator, kind)[parameter] = tensor
        values = json.loads((folder / PATTERN).read_text())
        self.step, self.config.rank_pattern = values["step"], values["rank_pattern"] or None


def _distance(gram: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
