"""The tensors of one forward pass."""

from typing import Any

import torch
from torch import Tensor

# Name -> argument of the objective: tensors, which go to the model's device, and plain numbers, which stay.
Batch = dict[str, Any]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on a device; the copies do not wait for the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
