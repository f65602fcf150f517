"""The frozen weights exactly as training saw them, from one tensor of the base's files at a time."""

import torch
from torch import Tensor

from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.models.quantised import quantised_linear
from glora_llm.schema import ModelSection


def trained_weight(weight: Tensor, section: ModelSection, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what a linear with this stored weight (O, I) computed with in training, in float32 on `device`.

    A quantised base was quantised from its files on loading; doing the same to one tensor and unpacking it again gives
    the W0 that was trained, bit for bit on the same kind of device.

    Args:
        section: how the base was loaded; its quantisation counts.
        dtype: what the base was computed in.
        device: where it is quantised and unpacked.
    """
    weight = weight.to(device, dtype)
    if section.quantization == "none":
        return weight.float()
    return dense_weight(quantised_linear(weight, section, dtype, device), dtype).float()
