"""Visual prompt tuning (VPT, arXiv 2203.12119): learnt vectors beside the patches of a vision transformer.

With x the state of the class token, E those of the patches and L_i the i-th of N layers, all of them frozen:

    shallow  [x_1, Z_1, E_1] = L_1([x_0, P, E_0]),  [x_i, Z_i, E_i] = L_i([x_{i-1}, Z_{i-1}, E_{i-1}])   (eq. 4, 5)
    deep     [x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}])                                           (eq. 6)

The head reads x_N, and is trained with the prompts P. Every P starts uniform in +-sqrt(6 / (3 S^2 + H)), Xavier's bound
of the patch embedding, as the authors' code has it; its dropout is of the prompts as they are inserted. The paper tries
1, 5, 10, 50, 100 and 200 prompts.

Letters: B images, T tokens, P prompts, H hidden, S side of a patch in pixels.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from glora_llm.adapters.module_config import ModuleConfig, require_dropout
from glora_llm.adapters.tuner import ModuleLayer, ModuleTuner, register
from glora_llm.errors import UserError
from glora_llm.glora.config import add_peft_type

FAMILIES = ("vit",)  # their head reads the class token alone, the first one


@dataclass
class VPTConfig(ModuleConfig):
    """Configuration of visual prompts; its places are the layers that follow from `deep`.

    Args:
        num_tokens: P, prompts of a layer.
        deep: new prompts at every layer in the place of what the last one made of its own; False: at the first alone.
        dropout: of the prompts, in training.
        patch_size: S; None: that of the model.
    """

    own_type: ClassVar[PeftType] = add_peft_type("VPT")
    num_tokens: int = field(default=10)
    deep: bool = field(default=True)
    dropout: float = field(default=0.0)
    patch_size: int | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_tokens < 1:
            raise UserError(f"adapter.peft.num_tokens is {self.num_tokens}; a prompt has 1 token or more.")
        require_dropout(self.dropout)


class VPTLayer(ModuleLayer):
    """A frozen transformer layer that is given prompts behind the class token."""

    adapter_layer_names = ("vpt_prompt",)
    unmerged = "its prompts are further tokens of the input of a layer, and no weight of a plain model holds these"

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.vpt_prompt = nn.ParameterDict({})
        self.dropout: dict[str, float] = {}
        self.deep: dict[str, bool] = {}

    def add_adapter(self, adapter_name: str, config: VPTConfig) -> None:
        """Draw the prompts (P, H) of an adapter."""
        norm = getattr(self.base_layer, "layernorm_before", None)
        if norm is None:
            raise UserError(
                f"adapter.targets: a {type(self.base_layer).__name__} is no layer of a ViT, at whose input VPT puts "
                "its prompts. adapter.targets=all-linear leaves the layers to adapter.peft.deep."
            )
        hidden = norm.normalized_shape[0]
        bound = prompt_bound(config.patch_size, hidden)
        self.vpt_prompt[adapter_name] = nn.Parameter(torch.empty(config.num_tokens, hidden).uniform_(-bound, bound))
        self.dropout[adapter_name], self.deep[adapter_name] = config.dropout, config.deep

    def adapt_input(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return the tokens (B, T, H) with the prompts behind the first: (B, T + P, H)."""
        prompt = self.vpt_prompt[adapter_name].to(x.dtype).expand(x.shape[0], -1, -1)
        prompt = nn.functional.dropout(prompt, self.dropout[adapter_name], self.training)
        return torch.cat([x[:, :1], prompt, x[:, 1:]], dim=1)

    def adapt_output(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the states (B, T + P, H) as they are, or without those of deep prompts, which nobody reads."""
        if not self.deep[adapter_name]:
            return y
        return torch.cat([y[:, :1], y[:, 1 + self.vpt_prompt[adapter_name].shape[0] :]], dim=1)


class VPTModel(ModuleTuner):
    """Puts prompts at the input of a ViT's layers."""

    prefix = "vpt_"
    tuner_layer_cls = VPTLayer

    def places(self, config: VPTConfig, model: nn.Module) -> list[str]:
        """Return the names of all layers, or of the first for shallow prompts."""
        found = layers_of(model, "vpt")
        return found if config.deep else found[:1]

    def _prepare_adapter_config(self, peft_config: VPTConfig, model_config: dict[str, Any]) -> VPTConfig:
        if peft_config.patch_size is None:
            peft_config.patch_size = model_config.get("patch_size")
        found: VPTConfig = super()._prepare_adapter_config(peft_config, model_config)
        return found


def layers_of(model: nn.Module, method: str) -> list[str]:
    """Return the full names of the layers of a ViT.

    Args:
        method: that puts prompts into them.

    Raises:
        UserError: for another model.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    found = [
        f"{name}.{number}"
        for name, module in model.named_modules()
        if kind in FAMILIES and isinstance(module, nn.ModuleList)
        for number in range(len(module))
    ]
    if not found:
        raise UserError(
            f"adapter.method {method} puts prompts beside the patches of a {' or '.join(FAMILIES)} model, whose head "
            f"reads the class token alone, and this is a {kind} model. Take another method (`glora-llm methods`)."
        )
    return found


def prompt_bound(patch_size: int | None, hidden: int) -> float:
    """Return Xavier's bound of the patch embedding, within which prompts begin."""
    assert patch_size is not None  # of the model's configuration
    return math.sqrt(6 / (3 * patch_size**2 + hidden))


register("vpt", VPTConfig, VPTModel)
