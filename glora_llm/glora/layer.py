"""One frozen linear with GLoRA slots, as a layer of PEFT. Each slot is a ModuleDict keyed by adapter name.

Layers of other kinds are subclasses: `conv`, `embedding`, `experts`.
"""

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from glora_llm.errors import AdapterError
from glora_llm.glora.config import GLoRAConfig
from glora_llm.glora.frozen_weight import compute_dtype, dense_weight, frozen_weight
from glora_llm.glora.linear import Slots, effective, glora_linear
from glora_llm.glora.modes import make_slot, slot_numel, slot_values
from glora_llm.glora.path import LayerPath, SlotSpec, slots_with
from glora_llm.glora.supernet import SlotChoices, gate, largest_path, make_choices
from glora_llm.models.matrices import dense_twin, matrix_shape
from glora_llm.schema.slots import SLOTS


class GLoRALinear(nn.Module, BaseTunerLayer):
    """A frozen linear with GLoRA slots.

    Args:
        base_layer: `nn.Linear`, with or without bias, transformers' `Conv1D` (a linear whose weight is stored as its
            transpose, (I, O)), or bitsandbytes' `Linear4bit` or `Linear8bitLt`.
        input_dtype: of the inputs to come. It counts where an int8 base is merged, which computes in its input's dtype
            and has none of its own; None: torch's default.
    """

    adapter_layer_names = tuple(f"slot_{slot}" for slot in SLOTS)
    other_param_names = ("composition", "path", "dropout", "choices", "scales")
    merges_into_bias = True  # C and E are a bias of the merged layer

    # Typed here because PEFT's mixin comes after nn.Module, whose attributes may be anything.
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, input_dtype: torch.dtype | None = None):
        super().__init__()
        self.base_layer = base_layer
        self._input_dtype = input_dtype or torch.get_default_dtype()
        self.out_features, self.in_features = self._matrix_shape(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.composition: dict[str, str] = {}
        self.path: dict[str, LayerPath] = {}
        self.dropout: dict[str, float] = {}
        self.choices: dict[str, SlotChoices] = {}  # of adapters that are supernets
        self.scales: dict[str, dict[str, dict[str, float]]] = {}  # adapter -> slot -> mode -> factor, where not 1
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        # The original base while merged. In a list, so that it is no submodule: it would be in state_dict and in the
        # number of parameters beside the merged weight.
        self._unmerged: list[nn.Module] = []

    def update_layer(self, adapter_name: str, config: GLoRAConfig, path: LayerPath, generator: Any = None) -> None:
        """Allocate the slots of one adapter.

        Raises:
            AdapterError: for D on a layer without bias, where it does nothing.
        """
        choices = config.choices
        if choices:
            path = largest_path(choices, self.b0 is not None)
        elif config.d_without_bias == "none" and self.b0 is None:
            path = path.without("D")
        if path["D"].mode != "none" and self.b0 is None:
            raise AdapterError(
                "Slot D scales the frozen bias b0, and this layer has none, so D would train nothing. "
                "Set D to none, or give it by `paths` to the layers that have a bias."
            )
        self.composition[adapter_name], self.path[adapter_name] = config.composition, path
        self.dropout[adapter_name] = config.dropout
        if choices:
            self.choices[adapter_name] = choices
            for slot in slots_with(self.b0 is not None):
                shape = (config.composition, *self._slot_shape(slot), generator)
                getattr(self, f"slot_{slot}")[adapter_name] = make_choices(slot, choices[slot], *shape)
        for slot, spec in () if choices else path.active():
            shape = (config.composition, *self._slot_shape(slot), generator)
            getattr(self, f"slot_{slot}")[adapter_name] = make_slot(slot, spec, *shape)
        if not config.init_weights:
            self._draw(adapter_name, generator)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _matrix_shape(self, base_layer: nn.Module) -> tuple[int, int]:
        return matrix_shape(base_layer)

    def _slot_shape(self, slot: str) -> tuple[int, int]:
        """Return (O, I) by which a slot's parameters are sized."""
        return self.out_features, self.in_features

    def slot_numel(self, slot: str, spec: SlotSpec) -> int:
        """Return the trainable parameters of a slot of a supernet."""
        return slot_numel(slot, spec, self.composition["default"], self.out_features, self.in_features)

    def _draw(self, adapter_name: str, generator: torch.Generator | None) -> None:
        """Give every parameter of an adapter a small random value, as PEFT's `init_weights=False` does."""
        for parameter in self._parameters_of(adapter_name):
            if parameter.device.type != "meta":
                nn.init.normal_(parameter, std=0.05, generator=generator)

    def slots(self, adapter_name: str, read: Callable[[Tensor], Tensor] | None = None) -> Slots:
        """Return the current values of an adapter's slots on its path, with their autograd history.

        Args:
            read: what stands for a parameter in the graph; None: the parameter itself.
        """
        found: dict[str, Any] = {}
        for slot, spec in self.path[adapter_name].active():
            owner = getattr(self, f"slot_{slot}")[adapter_name]
            found |= slot_values(slot, spec, owner, read or _itself, self.factor(adapter_name, slot, spec.mode))
        return Slots(**found)

    def factor(self, adapter_name: str, slot: str, mode: str) -> float:
        """Return what multiplies a slot of an adapter, beside the scale of its rank."""
        return self.scales.get(adapter_name, {}).get(slot, {}).get(mode, 1.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return f(x), (..., O), for x (..., I)."""
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            self._check_mixed_batch(x, names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if names is not None:
            return self._mixed_batch(x, names, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.path]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        y = self._one(x, active[0])
        if len(active) > 1:
            plain = self.base_layer(x, *args, **kwargs)
            for name in active[1:]:
                y = y + self._one(x, name) - plain
        return y

    def _one(self, x: Tensor, adapter_name: str) -> Tensor:
        device = x.device.type
        given = x.dtype
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        else:
            x = x.to(compute_dtype(self.base_layer) or given)
        dropout = self.dropout[adapter_name]
        dropped = nn.functional.dropout(x, dropout) if dropout and self.training else None
        read = None
        if adapter_name in self.choices:
            parameters = self._parameters_of(adapter_name)
            if torch.is_grad_enabled():
                x, read = gate(x, parameters)
        with torch.autocast(device, enabled=False):
            y = self._compute(x, dropped, adapter_name, read)
        return y if torch.is_autocast_enabled(device) else y.to(given)

    def _compute(self, x: Tensor, dropped: Tensor | None, adapter_name: str, read: Any) -> Tensor:
        """Return f(x) of one adapter in x's dtype; `dropped` is x after dropout, None: x itself."""
        dtype = x.dtype
        return glora_linear(
            x,
            lambda: dense_weight(self.base_layer, dtype),
            self.out_features,
            self.b0,
            self.slots(adapter_name, read),
            self.composition[adapter_name],
            dropped,
            frozen_weight(self.base_layer, dtype) if self.path[adapter_name]["A"].mode == "block" else None,
        )

    def output_gradients(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss's gradients by the weight, (O, I), and bias, (O), from dy at the output, in dy's dtype."""
        dy = dy.reshape(-1, self.out_features)
        return dy.t() @ x.reshape(-1, self.in_features).to(dy.dtype), dy.sum(0)

    def _parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """Return all modes' parameters, each read as an attribute: under ZeRO 3 that gathers a partitioned one.

        All of them in every pass, whatever the path: DeepSpeed expects the same ones in the same order each time.
        """
        slots = [getattr(self, f"slot_{slot}") for slot in SLOTS]
        owners = [modules[adapter_name] for modules in slots if adapter_name in modules]
        return [getattr(owner, name) for owner in owners for name in owner._parameters]

    @property
    def b0(self) -> Tensor | None:
        """The frozen bias, (O), or None."""
        layer: Any = self._original()
        bias: Tensor | None = layer.bias
        return bias

    def _merged_dtype(self) -> torch.dtype:
        return compute_dtype(self._original()) or self._input_dtype

    def _check_mixed_batch(self, x: Tensor, names: list[str]) -> None:
        """Refuse what PEFT's LoRA refuses, in its words."""
        if len(names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Rows of one batch through different adapters; `__base__` is the frozen layer (inference only)."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for name in set(names) & set(self.path):
            rows = [index for index, other in enumerate(names) if other == name]
            y[rows] = self._one(x[rows], name).to(y.dtype)
        return y

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Return weight (O, I) and bias (O) with the adapters in them, in float32 (float64 for a float64 base).

        Every adapter acts on the original W0, so their order does not matter.
        """
        dtype = torch.promote_types(self._merged_dtype(), torch.float32)
        w0 = dense_weight(self._original(), self._merged_dtype()).to(dtype)
        b0 = None if self.b0 is None else self.b0.to(dtype)
        weight, bias = w0.clone(), b0
        for name in adapter_names:
            own_weight, own_bias = effective(w0, b0, self.slots(name).to(dtype), self.composition[name])
            weight += own_weight - w0
            if own_bias is not None:
                bias = own_bias if bias is None else bias + own_bias - (0 if b0 is None else b0)
        return weight, bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base by a dense layer with the adapters in it; the original is kept for an exact `unmerge`.

        Raises:
            ValueError: with `safe_merge`, when a merged value is not finite; nothing is changed then.
        """
        names = self._to_merge(adapter_names)
        if not names:
            return
        merged = self.merged_adapters + names
        weight, bias = self.merged_weight(merged)
        if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        twin = dense_twin(self._original(), weight, bias, self._merged_dtype())
        self._unmerged, self.base_layer, self.merged_adapters = [self._original()], twin, merged

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in self.path]

    def unmerge(self) -> None:
        """Put the original base layer back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer, self._unmerged = self._original(), []
        self.merged_adapters = []

    def _original(self) -> nn.Module:
        """Return the frozen base layer, whether an adapter is merged or not."""
        return self._unmerged[0] if self._unmerged else self.base_layer

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast the original base too, which is no submodule while merged."""
        for module in self._unmerged:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return "glora_llm." + super().__repr__()


def _itself(parameter: Tensor) -> Tensor:
    return parameter
