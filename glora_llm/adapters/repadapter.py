"""RepAdapter: a linear adapter before attention and before the feed-forward network, which vanishes when merged.

    x' = x + s (U (D x + d) + u),    D (r, I), U (I, r) of g blocks on its diagonal

x' goes into all linears that read the input of the attention, or of the feed-forward network: one adapter for q, k and
v. Each of them takes it up: W x' + b = W (I + s U D) x + (b + s W (U d + u)).

Without `with_bias` d and u are left out, so that a linear without bias stays without one when it is merged.

Source: arXiv 2302.08106, equations 4 to 8, and the authors' repadapter.py: two groups, D by Xavier's rule, all else
zero at the start, so that nothing is changed; `s` was chosen from 0.1, 0.5, 1, 5, 10 for each of their tasks. They
drop a tenth of the hidden values: adapter.dropout=0.1.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from glora_llm.adapters.module_config import ModuleConfig, require_dropout
from glora_llm.adapters.places import FAMILIES, blocks
from glora_llm.adapters.tuner import ModuleLayer, ModuleTuner, register
from glora_llm.errors import AdapterError, UserError
from glora_llm.glora.config import add_peft_type
from glora_llm.models.matrices import LINEARS, matrix_shape

PLACES = ("attention", "feed_forward")


@dataclass
class RepAdapterConfig(ModuleConfig):
    """Configuration of RepAdapter; target modules that are named are such as self_attn or mlp.

    Args:
        places: `attention` and `feed_forward` (the authors' RepBlock); attention alone is their RepAttn.
        r: width of the adapter.
        groups: g, the number of blocks of U; it divides r and the model's width.
        scale: s.
        dropout: of the r hidden values.
        with_bias: train d and u.
    """

    own_type: ClassVar[PeftType] = add_peft_type("REPADAPTER")
    places: list[str] = field(default_factory=lambda: list(PLACES))
    r: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.0
    with_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.places or set(self.places) - set(PLACES):
            raise AdapterError(f"places is {list(self.places)}; expected one or both of {', '.join(PLACES)}.")
        if self.r < 1 or self.groups < 1 or self.r % self.groups:
            raise AdapterError(
                f"groups is {self.groups} and the rank is {self.r}: the groups must divide it (groups 1 is dense)."
            )
        if not self.scale:
            raise AdapterError("scale is 0, and nothing would be trained; the authors chose it from 0.1 to 10.")
        require_dropout(self.dropout)


class RepAdapter(nn.Module):
    """The parameters of one adapter of width I.

    Args:
        width: I.
        config: with r, groups, scale, dropout and with_bias.

    Attributes:
        down: D (r, I).
        up: the blocks of U, one below the other (I, r / g): rows of group k read the k-th r / g hidden values.
        down_bias, up_bias: d (r) and u (I), or None.
    """

    def __init__(self, width: int, config: RepAdapterConfig):
        super().__init__()
        self.groups, self.scale, self.dropout = config.groups, config.scale, config.dropout
        self.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(config.r, width)))
        self.up = nn.Parameter(torch.zeros(width, config.r // config.groups))
        self.down_bias = nn.Parameter(torch.zeros(config.r)) if config.with_bias else None
        self.up_bias = nn.Parameter(torch.zeros(width)) if config.with_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x + s (U (D x + d) + u), (..., I), in the dtype of x."""
        up, bias = self.scaled_up(x)
        down_bias = None if self.down_bias is None else self.down_bias.to(x.dtype)
        hidden = nn.functional.linear(x, self.down.to(x.dtype), down_bias)
        hidden = nn.functional.dropout(hidden, self.dropout, self.training)
        return x + nn.functional.linear(hidden, up, bias)

    def scaled_up(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return s U as a matrix (I, r) with zeros outside of its blocks, and s u, in the dtype of `like`."""
        up = torch.block_diag(*(self.up * self.scale).to(like).chunk(self.groups))
        return up, None if self.up_bias is None else (self.up_bias * self.scale).to(like)


class RepAdapterLayer(ModuleLayer):
    """A RepAdapter before one module: an attention or feed-forward module, or its first linear."""

    adapter_layer_names = ("repadapter_block",)
    unmerged = ""
    without_biases = "with_bias: false"

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.readers = _readers(base_layer)
        self.repadapter_block = nn.ModuleDict()

    def add_adapter(self, adapter_name: str, config: RepAdapterConfig) -> None:
        """Make D, U, d and u.

        Raises:
            UserError: for groups that do not divide the width.
        """
        width = matrix_shape(self.inside(self.readers[0]))[1]
        if width % config.groups:
            raise UserError(f"{config.groups} groups do not divide the {width} inputs: set adapter.peft.groups.")
        self.repadapter_block[adapter_name] = RepAdapter(width, config)

    def adapt_input(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return x'."""
        adapted: Tensor = self.repadapter_block[adapter_name](x)
        return adapted

    def merges_into(self) -> list[str]:
        """Return the linears that read the adapted input."""
        return self.readers

    def merged_values(
        self, inside: str, adapter_names: list[str], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return W (I + s U D) and b + s W (U d + u); the adapter that is applied last comes first."""
        for name in reversed(adapter_names):
            adapter: Any = self.repadapter_block[name]
            up, up_bias = adapter.scaled_up(weight)
            if adapter.down_bias is not None:
                added = weight @ (up @ adapter.down_bias.to(weight) + up_bias)
                bias = added if bias is None else bias + added
            weight = weight + weight @ up @ adapter.down.to(weight)
        return weight, bias

    def added_biases(self) -> list[str]:
        """Return the readers without bias, where an adapter has d and u."""
        with_bias = any(adapter.down_bias is not None for adapter in self.repadapter_block.values())
        return [name for name in self.readers if with_bias and self.inside(name).bias is None]


class RepAdapterModel(ModuleTuner):
    """Puts `RepAdapterLayer` before attention and feed-forward modules."""

    prefix = "repadapter_"
    tuner_layer_cls = RepAdapterLayer

    def places(self, config: RepAdapterConfig, model: nn.Module) -> list[str]:
        """Return the modules that read the input of the attention and of the feed-forward network."""
        return [
            f"{block}.{getattr(parts, f'{place}_input')}"
            for block, parts in blocks(model).items()
            for place in PLACES
            if place in config.places
        ]


def _readers(module: nn.Module) -> list[str]:
    """Return the linears that read the input of an attention or feed-forward module, by their names inside it.

    Raises:
        UserError: for a module that has none of the known names, such as a mixture of experts.
    """
    if isinstance(module, LINEARS):
        return [""]
    linears = [name for name, child in module.named_children() if isinstance(child, LINEARS)]
    ways = ([name for name in linears if name in parts.readers] for parts in FAMILIES)
    found: list[str] = next(filter(None, ways), [])
    if not found:
        known = {name for parts in FAMILIES for name in parts.readers if name}
        inside = ", ".join(name for name, _ in module.named_children()) or "nothing"
        raise UserError(
            "RepAdapter goes before attention and feed-forward modules, and into the linears that read their input "
            f"({', '.join(sorted(known))}); a {type(module).__name__} has {inside}. Choose others by "
            "adapter.peft.places or adapter.targets."
        )
    return found


register("repadapter", RepAdapterConfig, RepAdapterModel)
