"""LORS (arXiv 2403.04303): stacked layers share most of their parameters, and each has a private low-rank residual.

The paper's static part is W_i = W_shared + sum over k of B_ik A_ik. On a frozen base the shared part is low-rank too:
W_i = W0_i + s (B_shared A_shared + B_i A_i), where layers of one name (the last part: `q_proj`) and one shape share
A_shared (r_shared, I) and B_shared (O, r_shared), and A_i (r, I), B_i (O, r) are private. The paper's K private
products of rank r' are one of rank K r'.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from glora_llm.adapters.factors import (
    Factors,
    FactorsConfig,
    FactorsModel,
    FactorsVariant,
    add_type,
    draw_down,
    owned,
    register,
)
from glora_llm.errors import AdapterError


@dataclass
class LorsConfig(FactorsConfig):
    """LoRA's configuration, and:

    Args:
        shared_rank: rank of what layers of one name and shape share; 0: the rank of the private factors.

    Raises:
        AdapterError: for a negative rank.
    """

    own_type: ClassVar[PeftType] = add_type("lors")
    shared_rank: int = field(default=0, metadata={"help": "rank of the shared factors; 0: that of the private ones"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared_rank < 0:
            raise AdapterError(f"shared_rank is {self.shared_rank}; expected a rank, or 0: the private one.")


class SharedFactors(nn.Module):
    """A and B that several layers hold: the same module in each, so PEFT's casts and moves keep it one.

    Args:
        down: A (r, I).
        up: B (O, r).
    """

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)


class LorsVariant(FactorsVariant):
    """The private and the shared product."""

    @staticmethod
    def factors(layer: Any, adapter: str) -> Iterator[Factors]:
        """Yield A_i and B_i, then A_shared and B_shared."""
        yield from FactorsVariant.factors(layer, adapter)
        shared = layer.lora_shared[adapter]
        yield shared.down, shared.up


class LorsModel(FactorsModel):
    """Puts LoRA layers into a model that share a second pair of factors."""

    variant = LorsVariant

    def extend(self, layer: Any, adapter_name: str, config: Any, name: str) -> None:
        """Give a layer the shared factors of its kind, which the first layer of the kind makes."""
        made: dict[Any, SharedFactors] = self.__dict__.setdefault("_shared_factors", {})
        kind = (adapter_name, name.rpartition(".")[2], layer.in_features, layer.out_features)
        if kind not in made:
            rank, like = config.shared_rank or config.r, layer.lora_A[adapter_name].weight
            down = draw_down((rank, layer.in_features), like)
            made[kind] = SharedFactors(down, torch.zeros(layer.out_features, rank, device=like.device))
            made[kind].requires_grad_(like.requires_grad)
        owned(layer, "lora_shared")[adapter_name] = made[kind]

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor], unwanted_adapter_names: Any
    ) -> dict[str, Tensor]:
        """Return what is saved: shared factors once, by the name of the first layer that holds them."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        first = _first_names(model)
        return {name: value for name, value in found.items() if first.get(name, name) == name}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what is loaded: the shared factors by the name of every layer that holds them."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return found | {name: found[one] for name, one in _first_names(model).items() if one in found}


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return the name of each shared factor -> the first name of the same one."""
    firsts: dict[int, str] = {}
    names = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False) if ".lora_shared." in name]
    return {name: firsts.setdefault(one, name) for name, one in names}


register("lors", LorsConfig, LorsModel)
