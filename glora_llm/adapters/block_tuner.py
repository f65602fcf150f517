"""Adapters behind or beside the sublayers of a transformer block: the layer and the tuner that such methods share."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glora_llm.adapters.methods import NONLINEAR
from glora_llm.adapters.places import blocks
from glora_llm.adapters.tuner import ModuleLayer, ModuleTuner
from glora_llm.errors import UserError


class BlockLayer(ModuleLayer):
    """A module of a block with adapters behind or beside it.

    Attributes:
        parallel: adapter -> whether it is given the module's input.
        width: of the model's hidden states.
        first: a hook of the first module of a feed-forward network of which this is the last one, where they are two
            and an adapter is beside them; else None.
        kept: what that first module was given, during a forward pass.
    """

    other_param_names: tuple[str, ...] = ("parallel",)
    unmerged = NONLINEAR

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.parallel: dict[str, bool] = {}
        self.width = 0
        self.first: RemovableHandle | None = None
        self.kept: Tensor | None = None

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add one adapter; on a model without weights it takes no memory either."""
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        with torch.device("meta") if device is not None and device.type == "meta" else contextlib.nullcontext():
            super().update_layer(adapter_name, config)

    def change(self, adapter_name: str, hidden: Tensor) -> Tensor:
        """Return A(h), (..., O), of h (..., I)."""
        raise NotImplementedError

    def adapt_output(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + A(x) or y + A(y)."""
        if not self.parallel[adapter_name]:
            return y + self.change(adapter_name, y)
        given = x if self.first is None else self.kept
        assert given is not None  # the first module of the network ran before the second
        return y + self.change(adapter_name, given.to(y.dtype))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base layer returns, with the active adapters applied."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.kept = None

    def sizes(self, parallel: bool) -> tuple[int, int]:
        """Return I and O of an adapter here: those of a linear, or the width of the hidden states."""
        base: Any = self.get_base_layer()
        if isinstance(base, nn.Linear):
            inputs, outputs = int(base.in_features), int(base.out_features)
        elif hasattr(base, "nx") and hasattr(base, "nf"):  # transformers' Conv1D
            inputs, outputs = int(base.nx), int(base.nf)
        else:
            inputs = outputs = self.width
        if not parallel:
            return outputs, outputs
        return (inputs if self.first is None else self.width), outputs


@dataclass
class Made:
    """Values that the layers of one adapter share while they are put into a model.

    Args:
        width: of the hidden states.
        rule: Compacter's left-hand matrices, once a layer has made them.
    """

    width: int
    rule: Any = None


@dataclass
class KeepInput:
    """A forward pre-hook of the first module of a feed-forward network: it shows the last one what it was given."""

    layer: BlockLayer

    def __call__(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the input until the last module has run."""
        self.layer.kept = args[0] if args else kwargs["hidden_states"]


class BlockTuner(ModuleTuner):
    """Puts adapters behind or beside the sublayers of every block."""

    tuner_layer_cls: type[BlockLayer]

    def places(self, config: Any, model: nn.Module) -> list[str]:
        """Return the full names of the modules whose output is a sublayer's."""
        found = []
        for name, parts in blocks(model).items():
            if config.places in ("attention", "both"):
                found.append(f"{name}.{parts.attention_output}")
            if config.places in ("feed_forward", "both"):
                found.append(f"{name}.{parts.feed_forward_output}")
        return found

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject the layers; what they share on the way is forgotten afterwards."""
        config: Any = self.peft_config[adapter_name]
        config.made = Made(_width(model))
        self.__dict__["_readers"] = _first_modules(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del config.made, self.__dict__["_readers"]

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target if isinstance(target, BlockLayer) else self.tuner_layer_cls(target)
        layer.width = peft_config.made.width
        first = self.__dict__["_readers"].get(current_key)
        if first is not None and peft_config.parallel and layer.first is None:
            layer.first = first.register_forward_pre_hook(KeepInput(layer), with_kwargs=True)
        if layer is not target:
            setattr(parent, target_name, layer)
        super()._create_and_replace(peft_config, adapter_name, layer, target_name, parent, current_key)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        hooks = [layer.first for layer in self.model.modules() if isinstance(layer, BlockLayer) and layer.first]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        return model


def _width(model: Any) -> int:
    """Return the width of a model's hidden states; 0 where it has no configuration."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", 0))


def _first_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return, by the name of the last module of a feed-forward network, the first one, where they are two."""
    with contextlib.suppress(UserError):  # of a family that is not known: the targets were named, and are taken as such
        return {
            f"{name}.{parts.feed_forward_output}": model.get_submodule(f"{name}.{parts.feed_forward_input}")
            for name, parts in blocks(model).items()
            if not parts.is_whole
        }
    return {}
