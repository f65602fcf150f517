"""NOAH (Neural Prompt Search, arXiv 2206.04673): in each block of a ViT an adapter, LoRA and prompts of searched sizes.

A block L with the state of the class token x and those of the patches E computes, with three sizes h, r, P of its own,

    [x', _, E'] = L([x, p, E])                      p (P, H): prompts at its input, as in deep VPT
    queries and values:  W z + s B A z              A (r, I), B (O, r): LoRA
    feed-forward:        y + U f(D y + d) + u       D (h, H), U (H, h): an adapter behind the network, before the sum

Size 0 is nothing at all. A supernet holds the largest of each. A smaller one is its first rows (columns of B and U;
u is whole), as in AutoFormer (2107.00651), so all sizes share weights. For every micro batch each block draws its
sizes: of each of the three none, or one of the sizes, each alike. The authors' sampler draws a depth for each of the
three instead, and fills the blocks up to it; here any block may have none, so those depths are among the structures.
The search is evolution under a limit on parameters, as for GLoRA's supernets.

Defaults are those of the authors' code: sizes 5, 10, 50 and 100, f = QuickGELU, s = 1. Their code differs in this: its
LoRA is on keys too, with one A for all three; the prompts of the last block that has some stay among the tokens;
prompts begin by Xavier's rule and linears as normal draws of 0.02, where here prompts begin as VPT's do and U and B
as zero; it drops a tenth of the prompts and of LoRA's input, not only of the adapter's hidden units (adapter.dropout).

Letters: B images, T tokens, H hidden, I and O inputs and outputs of a linear.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.utils.hooks import RemovableHandle

from glora_llm.adapters.bottleneck import activation_of
from glora_llm.adapters.noah_sizes import NoahConfig, NoahParts
from glora_llm.adapters.tuner import ModuleLayer, ModuleTuner, register
from glora_llm.adapters.vpt import layers_of, prompt_bound
from glora_llm.errors import AdapterError, UserError
from glora_llm.glora.path import LayerPath, SlotSpec
from glora_llm.glora.supernet import SlotChoices, gate, largest_path
from glora_llm.models.matrices import matrix_shape

LINEARS = {"query": "attention.q_proj", "value": "attention.v_proj"}  # with LoRA, by their names in a block
NETWORK = "mlp"


@dataclass
class Inside:
    """A forward hook of a module inside a block: it changes the module's output.

    Attributes:
        layer: the block's.
        name: a key of `LINEARS`, or `NETWORK`.
    """

    layer: "NoahLayer"
    name: str

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Return y (..., O) with the active adapters."""
        for adapter_name in self.layer.computed():
            if self.name == NETWORK:
                y = self.layer.adapt_network(adapter_name, y)
            else:
                y = self.layer.adapt_linear(adapter_name, self.name, args[0], y)
        return y


class NoahLayer(ModuleLayer):
    """A frozen block with an adapter, LoRA and prompts."""

    adapter_layer_names = ("noah_parts",)
    other_param_names = ("path", "choices", "composition", "settings")
    unmerged = ""  # LoRA alone can be: `NoahModel` looks

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.noah_parts = nn.ModuleDict()
        self.path: dict[str, LayerPath] = {}
        self.choices: dict[str, SlotChoices] = {}  # of adapters that are supernets
        self.composition: dict[str, str] = {}
        self.settings: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {}
        self.name = ""  # in the base model
        self.hooks: list[RemovableHandle] = []

    def add_adapter(self, adapter_name: str, config: NoahConfig) -> None:
        """Make the parameters of one adapter.

        Raises:
            UserError: for another module than a block of a ViT, or a rank that changes nothing.
        """
        if getattr(self.base_layer, "layernorm_before", None) is None:
            raise UserError(
                f"adapter.targets: a {type(self.base_layer).__name__} is no layer of a ViT, into which noah puts its "
                "modules. adapter.targets=all-linear takes all of them."
            )
        choices = config.choices
        path = config.path_of(self.name) if choices is None else largest_path(choices, False)
        linears = self._linears()
        most = min(min(shape) for shape in linears.values())
        specs = [path["lora"]] if choices is None else choices["lora"]
        rank = min((spec.rank for spec in specs if spec.rank), default=0)  # larger ones of a supernet may go unused
        if rank > most:
            raise UserError(
                f"LoRA of rank {rank} is above the smaller side of the linears here, {most}: more than "
                "that changes nothing. Lower its size (adapter.peft.lora, adapter.supernet.sizes, or the genome)."
            )
        sizes = {slot: spec.rank for slot, spec in path.active()}
        bound = prompt_bound(config.patch_size, self.in_features)
        self.noah_parts[adapter_name] = NoahParts(sizes, linears, self.in_features, bound)
        self.path[adapter_name], self.composition[adapter_name] = path, ""
        if choices is not None:
            self.choices[adapter_name] = choices
        self.settings[adapter_name] = (activation_of(config.activation), config.scale, config.dropout)
        if not self.hooks:
            inside = {**LINEARS, NETWORK: NETWORK}
            for key, name in inside.items():
                self.hooks.append(self.inside(name).register_forward_hook(Inside(self, key)))

    def _linears(self) -> dict[str, tuple[int, int]]:
        return {key: matrix_shape(self.inside(name)) for key, name in LINEARS.items()}

    @property
    def out_features(self) -> int:
        """H."""
        return self.in_features

    @property
    def in_features(self) -> int:
        """H."""
        norm: Any = self.base_layer.layernorm_before
        return int(norm.normalized_shape[0])

    @property
    def b0(self) -> Tensor | None:
        """None: a block has no slot D."""
        return None

    def slot_numel(self, slot: str, spec: SlotSpec) -> int:
        """Return the trainable parameters of a slot."""
        hidden, size = self.in_features, spec.rank
        if slot == "lora":
            return sum(size * (outputs + inputs) for outputs, inputs in self._linears().values())
        if slot == "adapter":
            return size * (2 * hidden + 1) + hidden if size else 0
        return size * hidden

    def computed(self) -> list[str]:
        """Return the adapters that a forward pass applies."""
        return [] if self.disable_adapters or self.merged else self.adapters()

    def adapt_input(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return the tokens (B, T, H) with the prompts behind the first: (B, T + P, H)."""
        parts: Any = self.noah_parts[adapter_name]
        if adapter_name in self.choices and torch.is_grad_enabled():
            x, _ = gate(x, parts.all())  # what is not drawn gets a gradient of zero, in every process
        size = self.path[adapter_name]["prompt"].rank
        if not size:
            return x
        prompt = parts.first("prompt", size, x).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], prompt, x[:, 1:]], dim=1)

    def adapt_output(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the states (B, T, H) without those of the prompts, which nobody reads."""
        size = self.path[adapter_name]["prompt"].rank
        return torch.cat([y[:, :1], y[:, 1 + size :]], dim=1) if size else y

    def adapt_linear(self, adapter_name: str, key: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B A x, (..., O), of a linear's input x (..., I) and output y."""
        rank, scale = self.path[adapter_name]["lora"].rank, self.settings[adapter_name][1]
        if not rank:
            return y
        parts: Any = self.noah_parts[adapter_name]
        thin = linear(x, parts.first(f"{key}_down", rank, x))
        return y + (scale * linear(thin, parts.first(f"{key}_up", rank, x))).to(y.dtype)

    def adapt_network(self, adapter_name: str, y: Tensor) -> Tensor:
        """Return y + U f(D y + d) + u, (..., H), of the feed-forward network's output."""
        units, (activation, _, rate) = self.path[adapter_name]["adapter"].rank, self.settings[adapter_name]
        if not units:
            return y
        parts: Any = self.noah_parts[adapter_name]
        narrow = activation(linear(y, parts.first("down", units, y), parts.first("down_bias", units, y)))
        narrow = dropout(narrow, rate, self.training)
        return y + linear(narrow, parts.first("up", units, y), parts.up_bias.to(y.dtype))

    def merges_into(self) -> list[str]:
        """Return the linears with LoRA."""
        return list(LINEARS.values())

    def merged_values(
        self, inside: str, adapter_names: list[str], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return W + s B A; the bias stays."""
        key = next(key for key, name in LINEARS.items() if name == inside)
        for name in adapter_names:
            rank = self.path[name]["lora"].rank
            parts: Any = self.noah_parts[name]
            if rank:
                down, up = (parts.first(f"{key}_{side}", rank, weight).to(weight.device) for side in ("down", "up"))
                weight = weight + self.settings[name][1] * (up @ down)
        return weight, bias


class NoahModel(ModuleTuner):
    """Puts NOAH's layers around the blocks of a ViT."""

    prefix = "noah_"
    tuner_layer_cls = NoahLayer

    def places(self, config: NoahConfig, model: nn.Module) -> list[str]:
        """Return the names of all blocks."""
        return layers_of(model, "noah")

    def _prepare_adapter_config(self, peft_config: NoahConfig, model_config: dict[str, Any]) -> NoahConfig:
        if peft_config.patch_size is None:
            peft_config.patch_size = model_config.get("patch_size")
        found: NoahConfig = super()._prepare_adapter_config(peft_config, model_config)
        return found

    def _create_and_replace(
        self,
        peft_config: NoahConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target if isinstance(target, NoahLayer) else NoahLayer(target)
        layer.name, layer.input_dtype = current_key, getattr(self.model, "dtype", None)
        if layer is not target:
            setattr(parent, target_name, layer)
        super()._create_and_replace(peft_config, adapter_name, layer, target_name, parent, current_key)

    def _check_merge_allowed(self) -> None:
        """Check that the active adapters are LoRA alone.

        Raises:
            AdapterError: naming a block that has something else.
        """
        super()._check_merge_allowed()
        for layer in self.model.modules():
            if isinstance(layer, NoahLayer):
                for name in layer.adapters():
                    others = [slot for slot, _ in layer.path[name].active() if slot != "lora"]
                    if others:
                        raise AdapterError(
                            f"An adapter of NoahModel cannot be merged: {layer.name} has {' and '.join(others)}, and "
                            "only LoRA is a part of a weight."
                        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        hooks = [hook for layer in self.model.modules() if isinstance(layer, NoahLayer) for hook in layer.hooks]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        return model


register("noah", NoahConfig, NoahModel)
