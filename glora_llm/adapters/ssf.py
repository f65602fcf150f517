"""SSF, scaling and shifting features: y * gamma + beta behind linears, norms and the patch embedding.

    y' = gamma * y + beta,    gamma (O) about 1, beta (O) about 0

Both become part of the layer in front of them: gamma * (W x + b) + beta = (gamma W) x + (gamma b + beta). An RMSNorm
has no bias for beta to go into, so only gamma is trained behind it. A linear without bias gets one when it is merged;
with `shift_without_bias: false` gamma alone is trained behind such linears too, which merges in every family.

Source: arXiv 2210.08823, equation 3 (the operation) and 5 (the merge); both start from a draw of standard deviation
0.02, as in the authors' code.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.utils import PeftType
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from glora_llm.adapters.module_config import ModuleConfig
from glora_llm.adapters.places import is_norm, outside_heads
from glora_llm.adapters.tuner import ModuleLayer, ModuleTuner, register
from glora_llm.errors import AdapterError, UserError
from glora_llm.glora.config import add_peft_type
from glora_llm.models.matrices import CONVOLUTIONS, LINEARS, matrix_shape
from glora_llm.training.sharding import whole_shape

CHANNELS_SECOND = (*CONVOLUTIONS, _BatchNorm, _InstanceNorm, nn.GroupNorm)  # (B, O, ...); all others (..., O)


@dataclass
class SSFConfig(ModuleConfig):
    """Configuration of SSF; its places are linears, norms and convolutions outside of the head.

    Args:
        shift_without_bias: train beta also behind linears and convolutions that have no bias.
        init_std: standard deviation of the start of gamma around 1 and of beta around 0; 0: nothing is changed.
    """

    own_type: ClassVar[PeftType] = add_peft_type("SSF")
    shift_without_bias: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.init_std < 1:
            raise AdapterError(f"init_std is {self.init_std}; expected a standard deviation from 0 to below 1.")


class SSFLayer(ModuleLayer):
    """gamma * y + beta behind one linear, convolution or norm."""

    adapter_layer_names = ("ssf_scale", "ssf_shift")
    unmerged = ""
    without_biases = "shift_without_bias: false"

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        if not is_place(base_layer):
            kind = type(base_layer).__name__
            raise UserError(
                f"SSF scales the output of linears, convolutions and norms with a weight; this is of class {kind}."
            )
        self.out_features = _width(base_layer)
        self.ssf_scale, self.ssf_shift = nn.ParameterDict(), nn.ParameterDict()

    def add_adapter(self, adapter_name: str, config: SSFConfig) -> None:
        """Make gamma (O), and beta (O) where the layer can have a bias."""
        draws = [torch.randn(self.out_features) * config.init_std for _ in range(2)]
        self.ssf_scale[adapter_name] = nn.Parameter(1 + draws[0])
        can_have = isinstance(self.base_layer, (*LINEARS, *CONVOLUTIONS))
        if _has_bias(self.base_layer) or (can_have and config.shift_without_bias):
            self.ssf_shift[adapter_name] = nn.Parameter(draws[1])

    def adapt_output(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return gamma * y + beta, computed in the wider of the two dtypes, in that of y."""
        shape = (-1, *(1,) * (y.dim() - 2)) if has_channels_second(self.base_layer) else (-1,)
        scale = self.ssf_scale[adapter_name].view(shape)
        if adapter_name not in self.ssf_shift:
            return (y * scale).to(y.dtype)
        return torch.addcmul(self.ssf_shift[adapter_name].view(shape), y, scale).to(y.dtype)

    def merged_values(
        self, inside: str, adapter_names: list[str], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the rows of the weight times gamma, and gamma * bias + beta."""
        one = float(weight.dim() == 1 and adds_one(self.inside("")))
        for name in adapter_names:
            scale = self.ssf_scale[name].to(weight)
            weight = (weight + one) * scale.view(-1, *(1,) * (weight.dim() - 1)) - one
            bias = None if bias is None else bias * scale
            if name in self.ssf_shift:
                shift = self.ssf_shift[name].to(weight)
                bias = shift if bias is None else bias + shift
        return weight, bias

    def added_biases(self) -> list[str]:
        """Return the layer itself, where it has no bias and an adapter has a beta."""
        return [""] if len(self.ssf_shift) and not _has_bias(self.inside("")) else []


class SSFModel(ModuleTuner):
    """Puts `SSFLayer` around linears, norms and convolutions."""

    prefix = "ssf_"
    tuner_layer_cls = SSFLayer

    def places(self, config: SSFConfig, model: nn.Module) -> list[str]:
        """Return the linears, norms and convolutions outside of the head."""
        return [name for name, module in outside_heads(model) if is_place(module)]


def is_place(module: Any) -> bool:
    """Tell whether a module is a linear, a convolution, or a norm with a weight (O) of its own."""
    return isinstance(module, (SSFLayer, *LINEARS, *CONVOLUTIONS)) or is_norm(module)


def has_channels_second(module: Any) -> bool:
    """Tell whether a module gives (B, O, ...), as convolutions and their norms do, and not (..., O).

    ConvNeXt's layer norms do either, by an attribute.
    """
    return isinstance(module, CHANNELS_SECOND) or getattr(module, "data_format", "") == "channels_first"


def adds_one(norm: Any) -> bool:
    """Tell whether a norm multiplies by 1 + weight, as Gemma's do: found by running it with a weight of zeros."""
    if isinstance(norm, (nn.LayerNorm, *CHANNELS_SECOND)):
        return False
    twin, width = copy.copy(norm), _width(norm)
    twin._parameters = {name: None if p is None else torch.zeros(width) for name, p in norm._parameters.items()}
    return bool(twin(torch.arange(1.0, width + 1)[None]).abs().max() > 0)


def _width(module: Any) -> int:
    return matrix_shape(module)[0] if isinstance(module, (*LINEARS, *CONVOLUTIONS)) else whole_shape(module.weight)[0]


def _has_bias(module: Any) -> bool:
    return getattr(module, "bias", None) is not None


register("ssf", SSFConfig, SSFModel)
