"""One linear quantised as the whole model is on loading."""

import torch
from torch import Tensor, nn

from glora_llm.models.load import keep_quantized_weights, quantization_config
from glora_llm.schema import ModelSection


def quantised_linear(weight: Tensor, section: ModelSection, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return bitsandbytes' linear without bias that holds `weight` (O, I), with the settings of a loaded model.

    Args:
        section: names the quantisation.
        dtype: what the model computes in.
    """
    from bitsandbytes import nn as bnb

    settings = quantization_config(section, dtype)
    assert settings is not None, "an unquantised model has no quantised linear"
    shape = (weight.shape[1], weight.shape[0])
    if section.quantization == "int8":
        threshold = settings.llm_int8_threshold
        layer = bnb.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
        layer.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return layer.to(device)
    layer = bnb.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type=section.quantization, device="meta")
    layer.weight = bnb.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=section.double_quantization,
        quant_type=section.quantization,
        quant_storage=dtype,
    )
    keep_quantized_weights(layer)
    return layer.to(device)
