"""Learning rates and optimizers. The learning rate is a pure function of the optimizer step, never DeepSpeed's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glora_llm.errors import UserError
from glora_llm.launch.extensions import load_extension
from glora_llm.schema import TrainingSection


@dataclass(frozen=True)
class Trainable:
    """One trained parameter: its name in checkpoints, and how it is stepped.

    Args:
        lr_factor: multiplies training.lr for it.
        group: parameters of other groups are never in one partition with it, which has one step count of Adam.
        decays: whether weight decay is for it, if it is a matrix.
        muon: whether Muon steps it where training.optimizer is muon: a matrix that is no embedding and no head.
    """

    name: str
    parameter: nn.Parameter
    lr_factor: float = 1.0
    group: str = ""
    decays: bool = True
    muon: bool = False


def lr_at(step: int, total: int, settings: TrainingSection) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of `total`.

    Linear warm-up over `settings.warmup` (a share below 1, else steps), whose first step is above zero, then cosine or
    linear to zero after the last step, or constant.
    """
    warmup = round(settings.warmup * total) if settings.warmup < 1 else round(settings.warmup)
    if step < warmup:
        return settings.peak_lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.peak_lr
    progress = (step - warmup) / max(1, total - warmup)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    return settings.peak_lr * left


def parameter_groups(trainables: Sequence[Trainable], weight_decay: float) -> list[dict[str, Any]]:
    """Group parameters by learning-rate factor, decay and optimizer; only matrices decay.

    Returns:
        optimizer groups with `params`, `lr_factor`, `weight_decay`, `muon`, `names`, in a fixed order.
    """
    groups: dict[tuple[float, float, str, bool], dict[str, Any]] = {}
    for item in trainables:
        matrix = len(getattr(item.parameter, "ds_shape", item.parameter.shape)) > 1
        decay = weight_decay if matrix and item.decays else 0.0
        kind = {"lr_factor": item.lr_factor, "weight_decay": decay, "muon": item.muon}
        key = (item.lr_factor, decay, item.group, item.muon)
        group = groups.setdefault(key, {"params": [], "names": [], **kind, "lr": 0.0})
        group["params"].append(item.parameter)
        group["names"].append(item.name)
    return list(groups.values())


def make_optimizer(settings: TrainingSection, groups: list[dict[str, Any]], offload: bool) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed wraps.

    Args:
        offload: the states live on the CPU: DeepSpeed's own CPU Adam is used.

    Raises:
        UserError: for an optimizer other than AdamW with offload, or a paged one without a GPU.
    """
    common: dict[str, Any] = {"lr": 0.0, "betas": settings.betas, "eps": settings.eps}
    if settings.optimizer == "adamw" and offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_extension("CPUAdamBuilder")
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    fused = all(p.device.type == "cuda" for group in groups for p in group["params"])
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=fused, **common)
    if settings.optimizer == "muon" and not offload:
        from glora_llm.training.muon import MuonAdamW

        return MuonAdamW(groups, settings.muon_momentum, fused=fused, **common)
    if offload:
        raise UserError(f"training.optimizer {settings.optimizer} keeps its states on the GPU; with offload use adamw.")
    import bitsandbytes

    if settings.optimizer.startswith("paged") and not torch.cuda.is_available():
        raise UserError(
            f"training.optimizer {settings.optimizer} pages from a GPU to CPU memory, and there is no GPU here."
        )
    classes = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    optimizer: torch.optim.Optimizer = classes[settings.optimizer](groups, **common)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its factor times `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
