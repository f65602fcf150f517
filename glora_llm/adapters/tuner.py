"""Base classes of this trainer's own PEFT methods beside GLoRA: a layer around any module, and its tuner.

A method is one file: a configuration, a subclass of `ModuleLayer` with its mathematics, a subclass of `ModuleTuner`
with its places, and `register`. Saving, loading, several adapters, disabling and unloading are PEFT's own.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method
from torch import Tensor, nn

from glora_llm.adapters.module_config import ALL, ModuleConfig
from glora_llm.errors import AdapterError, UserError
from glora_llm.glora import dense_model
from glora_llm.glora.frozen_weight import compute_dtype, dense_weight
from glora_llm.models.matrices import MATRICES, dense_twin


class ModuleLayer(nn.Module, BaseTunerLayer):
    """A frozen module of any kind (a linear, a norm, a whole block) with named adapters before and behind it.

    A subclass names its ModuleDicts or ParameterDicts, keyed by adapter, in `adapter_layer_names`, makes them in
    `__init__`, fills them in `add_adapter`, and says what they compute in `adapt_input` and `adapt_output`.

    Args:
        base_layer: its first argument, or else the argument `hidden_states`, is the input (..., I); its output (..., O)
            is a tensor, or a tuple whose first item is that tensor.
    """

    input_dtype: torch.dtype | None = None  # of the model: an int8 base has no dtype of its own
    unmerged: ClassVar[str] = "it has no form without its own module"  # why it cannot be merged; empty where it can
    without_biases: ClassVar[str] = ""  # the argument under which no linear gets a bias that it has not

    # Typed here because PEFT's mixin comes after nn.Module, whose attributes may be anything.
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        # The original modules while merged, by their names inside the base layer. No submodules: they would be in
        # state_dict beside the merged ones.
        self._originals: dict[str, nn.Module] = {}

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Make the parameters of one adapter.

        Raises:
            UserError: where the configuration does not fit the base layer.
        """
        raise NotImplementedError

    def adapt_input(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return what the base layer is given instead of x (..., I)."""
        return x

    def adapt_output(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return what stands for the base layer's output y (..., O) of x (..., I)."""
        return y

    def merges_into(self) -> list[str]:
        """Return the modules whose weights an adapter becomes part of, by their names inside the base layer ("")."""
        return [""]

    def merged_values(
        self, inside: str, adapter_names: list[str], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return weight (O, I), or (O) of a norm, and bias (O) of one of those modules with adapters in them.

        Args:
            adapter_names: in the order in which they are applied.
            weight: of the frozen module, outputs first however the module stores it.
        """
        raise NotImplementedError

    def added_biases(self) -> list[str]:
        """Return those of `merges_into` that have no bias, and get one when the adapters are merged."""
        return []

    def inside(self, name: str) -> Any:
        """Return the frozen module of this name inside the base layer; "" is the base layer itself."""
        if name in self._originals:
            return self._originals[name]
        return self.base_layer.get_submodule(name) if name else self.base_layer

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add one adapter, on the base layer's device."""
        self.add_adapter(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapters(self) -> list[str]:
        """Return the active adapters that this layer has, in their order."""
        owners = [getattr(self, owner) for owner in self.adapter_layer_names]
        return [name for name in self.active_adapters if any(name in owner for owner in owners)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base layer returns, with the active adapters applied one after the other."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self.adapters()
        if not names:
            return self.base_layer(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        for name in names:
            x = self.adapt_input(name, x)
        if not args:
            kwargs["hidden_states"] = x
        out = self.base_layer(x, *args[1:], **kwargs) if args else self.base_layer(**kwargs)
        y = out[0] if isinstance(out, tuple) else out
        for name in names:
            y = self.adapt_output(name, x, y)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters into the base layer; the originals are kept for an exact `unmerge`.

        Raises:
            AdapterError: for a method that cannot be merged.
            ValueError: with `safe_merge`, when a merged value is not finite; nothing is changed then.
        """
        if self.unmerged:
            raise AdapterError(f"{type(self).__name__} cannot be merged: {self.unmerged}.")
        own = self._get_available_adapters()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in own]
        if not names:
            return
        merged = self.merged_adapters + names
        if self.merged:
            self.unmerge()  # all are merged into the originals
        modules = {inside: self._merged(inside, merged) for inside in self.merges_into()}
        if safe_merge and not all(p.isfinite().all() for module in modules.values() for p in module.parameters()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        self._originals = {inside: self._swap(inside, module) for inside, module in modules.items()}
        self.merged_adapters = merged

    @torch.no_grad()
    def _merged(self, inside: str, adapter_names: list[str]) -> nn.Module:
        """Return what takes the place of a module inside the base layer: dense, in the dtype that it computes in."""
        module = self.inside(inside)
        dtype = compute_dtype(module) or self.input_dtype or torch.get_default_dtype()
        wide = torch.promote_types(dtype, torch.float32)
        bias = getattr(module, "bias", None)
        weight = dense_weight(module, dtype).to(wide)
        weight, bias = self.merged_values(inside, adapter_names, weight, None if bias is None else bias.to(wide))
        return with_values(module, weight, bias, dtype)

    def unmerge(self) -> None:
        """Put the original modules back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for inside, module in self._originals.items():
            self._swap(inside, module)
        self._originals, self.merged_adapters = {}, []

    def _swap(self, inside: str, module: nn.Module) -> nn.Module:
        """Put a module in the place of the base layer ("") or of one inside it; return the one that was there."""
        if not inside:
            was, self.base_layer = self.base_layer, module
            return was
        was = self.base_layer.get_submodule(inside)
        self.base_layer.set_submodule(inside, module)
        return was

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """Return those of the first module inside that has a weight: a whole block has none of its own."""
        holder = next((m for m in base_layer.modules() if getattr(m, "weight", None) is not None), base_layer)
        found: tuple[Any, Any] = super()._get_base_layer_device_and_dtype(holder)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast the originals too, which are no submodules while merged."""
        for module in self._originals.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        """Answer for the base layer: models read attributes of their blocks, such as `layer_idx` or `in_features`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)


class ModuleTuner(BaseTuner):
    """Puts a method's layers into a model.

    A subclass sets `prefix` and `tuner_layer_cls`, and says in `places` which modules the method adapts where
    `target_modules` is `all-linear` or None; other `target_modules` are taken as PEFT takes them.
    """

    tuner_layer_cls: type[ModuleLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def places(self, config: Any, model: nn.Module) -> list[str]:
        """Return the full names of the modules that the method adapts.

        Raises:
            UserError: for a model of a family whose blocks are not known.
        """
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules in (None, ALL):
            peft_config.target_modules = set(self.places(peft_config, self.model))
        return peft_config

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
        layer = target
        try:
            if not isinstance(layer, self.tuner_layer_cls):
                layer = self.tuner_layer_cls(target)
                layer.input_dtype = getattr(self.model, "dtype", None)
            layer.update_layer(adapter_name, peft_config)
        except UserError as error:
            raise AdapterError(f"{current_key}: {error}") from None
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in the place of a module, or a module back; PEFT expects every module to have a weight then."""
        if isinstance(new_module, ModuleLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge and self.tuner_layer_cls.unmerged:
            reason = self.tuner_layer_cls.unmerged
            raise AdapterError(f"An adapter of {type(self).__name__} cannot be merged: {reason}.")
        model: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge:
            dense_model.complete(model)
        return model


def with_values(module: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """Return a frozen dense module of the kind of `module` with other values: weight, outputs first, and bias (O)."""
    if isinstance(module, MATRICES):
        return dense_twin(module, weight, bias, dtype)
    twin = copy.copy(module)  # a norm: its other attributes are settings
    values = {"weight": weight, "bias": bias}
    twin._parameters = dict(module._parameters) | {
        name: nn.Parameter(value.to(dtype), requires_grad=False) for name, value in values.items() if value is not None
    }
    return twin


def register(name: str, config: type[ModuleConfig], model: type[ModuleTuner]) -> None:
    """Make a method known to PEFT; its type was added by `add_peft_type`, for the configuration to name it."""
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)
