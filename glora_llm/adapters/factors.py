"""Base classes of LoRA's relatives whose increment is a sum of products of two factors; PEFT's LoRA does the rest.

dW = s (B A + further B_k A_k), s = alpha / r. A method is one file: a configuration, a `FactorsVariant` that names its
factors, and a `FactorsModel` that adds what a layer holds beside A and B. PEFT's layers for dense, 4-bit and 8-bit
linears compute, merge, save and load; the base's weight is never read in training.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraVariant
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from glora_llm.errors import AdapterError
from glora_llm.glora.config import add_peft_type

Factors = tuple[Tensor, Tensor]  # A (r, I) and B (O, r)


@dataclass
class FactorsConfig(LoraConfig):
    """LoRA's configuration without the arguments that make it another method.

    Raises:
        AdapterError: when one of them is given.
    """

    own_type: ClassVar[PeftType]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.own_type
        switches = [item.name for item in dataclasses.fields(LoraConfig) if item.metadata.get("is_lora_variant")]
        others = [*switches, "lora_bias", "layer_replication", "target_parameters", "megatron_config"]
        given = [name for name in others if getattr(self, name, None)]
        if self.bias != "none":
            given.append("bias")
        if given:
            raise AdapterError(
                f"{given[0]} makes LoRA another method, and {self.own_type.value.lower()} is one already: leave it out."
            )


class FactorsVariant(LoraVariant):
    """Computes, merges and takes away the increment of a layer from its factors."""

    @staticmethod
    def factors(layer: Any, adapter: str) -> Iterator[Factors]:
        """Yield the pairs whose products are summed, as they are after training."""
        yield layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    @classmethod
    def computed(cls, layer: Any, adapter: str) -> Iterator[Factors]:
        """Yield the pairs as this forward pass uses them."""
        yield from cls.factors(layer, adapter)

    @staticmethod
    def init(module: LoraLayer, adapter_name: str) -> None:
        """Nothing: `FactorsModel.extend` makes what a layer needs."""

    @classmethod
    def forward(  # type: ignore[override]
        cls, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return the layer's output (..., O) for the input x (..., I) and the base's output."""
        x = module.lora_dropout[active_adapter](x)
        pairs = [(down.to(x.dtype), up.to(x.dtype)) for down, up in cls.computed(module, active_adapter)]
        # One product of a larger rank: further ones would read x, and write an output, each for itself.
        down, up = pairs[0]
        if len(pairs) > 1:
            down, up = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
        return result + functional.linear(functional.linear(x, down), up) * module.scaling[active_adapter]

    @classmethod
    def delta(cls, layer: Any, adapter: str) -> Tensor:
        """Return s (B A + ...), in the weight's own layout: (O, I), or (I, O) of a Conv1D."""
        found = sum(up.float() @ down.float() for down, up in cls.factors(layer, adapter))
        assert isinstance(found, Tensor)
        found = found * layer.scaling[adapter]
        return found.T if getattr(layer, "fan_in_fan_out", False) else found

    @classmethod
    def merge_safe(  # type: ignore[override]
        cls, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        """Return a new weight with the increment in it."""
        return (orig_weight + cls.delta(module, active_adapter).to(orig_weight.device)).to(orig_weight.dtype)

    @classmethod
    def merge_unsafe(  # type: ignore[override]
        cls, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> None:
        """Add the increment to the weight."""
        orig_weight.data = cls.merge_safe(module, active_adapter, orig_weight.data)

    @classmethod
    def unmerge(  # type: ignore[override]
        cls, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        """Return the weight without the increment."""
        delta = cls.delta(module, active_adapter).to(orig_weight.device)
        return (orig_weight.data - delta).to(orig_weight.dtype)


class FactorsModel(LoraModel):
    """Puts PEFT's LoRA layers into a model, and gives each the method's variant."""

    variant: ClassVar[type[FactorsVariant]] = FactorsVariant

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **more: Any,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, LoraLayer) else target
        if not isinstance(base, nn.Linear | Conv1D):
            raise AdapterError(f"'{current_key}' is a {type(base).__name__}, and only linears are adapted.")
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **more)
        layer: Any = parent.get_submodule(target_name)
        self.extend(layer, adapter_name, lora_config, current_key)
        layer.lora_variant[adapter_name] = self.variant()

    def extend(self, layer: Any, adapter_name: str, config: Any, name: str) -> None:
        """Add to a layer what its variant reads beside A and B.

        Args:
            name: of the layer in the base model.
        """


def owned(layer: Any, attribute: str) -> nn.ModuleDict:
    """Return a ModuleDict of a LoRA layer, keyed by adapter, that PEFT treats as its A and B; made at first."""
    if attribute not in layer.adapter_layer_names:
        layer.adapter_layer_names = (*layer.adapter_layer_names, attribute)
        setattr(layer, attribute, nn.ModuleDict({}))
    found: nn.ModuleDict = getattr(layer, attribute)
    return found


def draw_down(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a new A (r, I) as LoRA begins with: uniform in +-1 / sqrt(I)."""
    if like.device.type == "meta":
        return torch.empty(shape, device="meta")
    bound = shape[-1] ** -0.5
    return (torch.rand(shape, generator=generator) * 2 - 1).mul_(bound).to(like.device)


def add_type(name: str) -> PeftType:
    """Return a new PEFT type, for the configuration of a method to name it."""
    return add_peft_type(name.upper())


def register(name: str, config: type[FactorsConfig], model: type[FactorsModel]) -> None:
    """Make a method known to PEFT."""
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)
