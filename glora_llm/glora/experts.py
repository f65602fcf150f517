"""GLoRA on stacked expert weights: A and B of each expert.

Letters: N experts, O outputs, I inputs, r rank.

transformers 5 keeps the experts of a layer (Mixtral's, say) as parameters (N, O, I) of one module, without an
`nn.Linear` (as (N, I, O) where its `is_transposed` says so). Every expert n gets slots of its own on each parameter:

    W[n] = W0[n] + W0[n] A[n] + B[n]      A (N, I, r)(N, r, I), hadamard (N, O, r)(N, r, I);   B (N, O, r)(N, r, I)

Mode vector is a gain, or a shift, for each output of each expert, scalar one for each expert. C, D and E have no
meaning: they are, or scale, a bias, and the module's own forward pass multiplies by the weights alone.

PEFT's LoRA on such parameters (`target_parameters`) forms the changed weight before the module's forward pass, and so
does this: all N matrices are formed, and kept for the backward pass. There is no dropout, as x is inside of that
forward pass.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from glora_llm.errors import AdapterError
from glora_llm.glora.config import GLoRAConfig
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.path import LayerPath, SlotSpec

NO_MEANING = "is, or scales, a bias, and experts multiply by their weights alone"


def stacks_of(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return the stacked weights of a module of experts, (N, O, I) by name; empty: it is none."""
    turned = bool(getattr(module, "is_transposed", False))
    found = {}
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() == 3:
            count, rows, columns = parameter.shape
            found[name] = (count, columns, rows) if turned else (count, rows, columns)
    return found


class _Stacked(nn.Module):
    """One slot of all experts on one parameter, under the names of a linear's slot."""

    def __init__(self, slot: str, spec: SlotSpec, composition: str, shape: tuple[int, int, int], generator: Any):
        super().__init__()
        count, rows, columns = shape
        if spec.mode == "lora":
            height = columns if slot == "A" and composition == "product" else rows
            self.down = nn.Parameter(torch.zeros(count, height, spec.rank))
            self.up = nn.Parameter(torch.empty(count, spec.rank, columns))
            if self.up.device.type != "meta":
                bound = 1 / math.sqrt(columns)  # Kaiming uniform with a = sqrt(5), as of one expert's matrix
                nn.init.uniform_(self.up, -bound, bound, generator=generator)
        elif spec.mode == "vector":
            self.vector = nn.Parameter(torch.zeros(count, rows))
        else:
            self.scalar = nn.Parameter(torch.zeros(count, 1))

    def change(self, slot: str, spec: SlotSpec, composition: str, w0: Tensor) -> Tensor | float:
        """Return what the slot adds to W0, (N, O, I)."""
        if spec.mode != "lora":
            value = getattr(self, spec.mode).to(w0.dtype)[:, :, None]
            return value * w0 if slot == "A" else value.expand_as(w0)
        down, up = spec.scale * self.down.to(w0.dtype), self.up.to(w0.dtype)
        if slot == "B":
            return down @ up
        return (w0 @ down) @ up if composition == "product" else w0 * (down @ up)


class GLoRAExperts(GLoRALinear):
    """A frozen module of stacked experts with slots A and B."""

    merges_into_bias = False

    def _matrix_shape(self, base_layer: nn.Module) -> tuple[int, int]:
        return next(iter(stacks_of(base_layer).values()))[1:]

    @property
    def b0(self) -> None:
        """None: experts have no bias that a slot acts on."""

    def update_layer(self, adapter_name: str, config: GLoRAConfig, path: LayerPath, generator: Any = None) -> None:
        """Allocate the slots of one adapter.

        Raises:
            AdapterError: for a slot or mode that has no meaning here, dropout, a supernet, or weights that ZeRO 3 has
                divided.
        """
        self._check(config, path)
        self.composition[adapter_name], self.path[adapter_name] = config.composition, path
        self.dropout[adapter_name] = 0.0
        for slot, spec in path.active():
            made = {
                name: _Stacked(slot, spec, config.composition, shape, generator)
                for name, shape in stacks_of(self.base_layer).items()
            }
            first = next(self.base_layer.parameters())
            where = "cpu" if first.is_meta else first.device
            holder = nn.ModuleDict(made)
            is_meta = any(parameter.is_meta for parameter in holder.parameters())
            getattr(self, f"slot_{slot}")[adapter_name] = holder if is_meta else holder.to(where, first.dtype)
        if not config.init_weights:
            self._draw(adapter_name, generator)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check(self, config: GLoRAConfig, path: LayerPath) -> None:
        own = "give the experts slots of their own by `paths`: {experts: {A: lora, B: lora}}"
        if config.choices:
            raise AdapterError("A supernet is of linears and convolutions, and these are stacked experts.")
        for slot in "CDE":
            if path[slot].mode != "none" and not (slot == "D" and config.d_without_bias == "none"):
                raise AdapterError(f"Slot {slot} {NO_MEANING}. They have A and B: {own}.")
        if path["A"].mode == "block":
            raise AdapterError(f"Slot A in mode block is of a single matrix, and these are stacked experts: {own}.")
        if config.dropout:
            raise AdapterError(
                "dropout is of the input of A and B, which is inside the forward pass of stacked experts. Set "
                "adapter.dropout=0."
            )
        if any(hasattr(parameter, "ds_id") for parameter in self.base_layer.parameters()):
            raise AdapterError(
                "Stacked experts are not adapted where ZeRO 3 divides weights: training.deepspeed=zero2."
            )

    def _parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        slots = [getattr(self, name) for name in self.adapter_layer_names]
        return [p for modules in slots if adapter_name in modules for p in modules[adapter_name].parameters()]

    def _changed(self, module: nn.Module, names: list[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the weights with adapters in them as the module keeps them; every adapter acts on the original."""
        turned = bool(getattr(module, "is_transposed", False))
        found = {}
        for stack in stacks_of(module):
            stored: Any = getattr(module, stack)
            w0 = stored.detach().to(dtype or stored.dtype)
            w0 = w0.transpose(1, 2) if turned else w0
            weight = w0
            for name in names:
                for slot, spec in self.path[name].active():
                    owner = getattr(self, f"slot_{slot}")
                    if name in owner:
                        weight = weight + owner[name][stack].change(slot, spec, self.composition[name], w0)
            found[stack] = weight.transpose(1, 2) if turned else weight
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module of experts computes of its arguments with the changed weights.

        Raises:
            ValueError: with `adapter_names`: the rows of a batch are mixed among the experts.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("Cannot pass `adapter_names` where stacked experts are adapted: they mix the rows.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.path]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, self._changed(self.base_layer, active), args, kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base by a module with the adapters in its weights; the original is kept for an exact `unmerge`.

        Raises:
            ValueError: with `safe_merge`, when a merged value is not finite; nothing is changed then.
        """
        names = self._to_merge(adapter_names)
        if not names:
            return
        original, merged = self._original(), self.merged_adapters + names
        changed = self._changed(original, merged, torch.promote_types(self._stored_dtype(), torch.float32))
        if safe_merge and not all(bool(weight.isfinite().all()) for weight in changed.values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        twin = copy.copy(original)
        twin._parameters = original._parameters | {
            stack: nn.Parameter(weight.to(self._stored_dtype()).contiguous(), requires_grad=False)
            for stack, weight in changed.items()
        }
        self._unmerged, self.base_layer, self.merged_adapters = [original], twin, merged

    def _stored_dtype(self) -> torch.dtype:
        return next(self._original().parameters()).dtype
