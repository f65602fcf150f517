"""GLoRA as a tuner of PEFT: `get_peft_model(model, GLoRAConfig(...))`, save, load, merge, several adapters.

Its PEFT type is GLORA_LLM (GLORA is PEFT's own tuner, which ties A to B and D to E and drops C, D, E on bias-free
layers). Each slot is a ModuleDict keyed by adapter name: `q_proj.slot_A.default.down`.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.glora import dense_model
from glora_llm.glora.frozen_weight import compute_dtype, dense_weight
from glora_llm.glora.linear import Slots, effective, glora_linear
from glora_llm.glora.modes import Lora, make_slot
from glora_llm.glora.path import DEFAULT_SLOTS, SLOTS, Path, make_path, path_for


def _add_peft_type(name: str) -> PeftType:
    """PEFT's types are a closed Enum; a method outside PEFT has to add its member by hand."""
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    return member


GLORA_LLM = _add_peft_type("GLORA_LLM")


@dataclass
class GLoRAConfig(PeftConfig):
    """What `get_peft_model` needs to inject GLoRA.

    Args:
        target_modules: names, one regular expression, or `all-linear`.
        slots: slot -> mode, or slot -> {mode, rank, alpha}; default A lora, B lora, C vector, E vector.
        paths: regular expression on the module's name -> slots, for single layers; the last match wins.
        rank: r of mode lora.
        alpha: mode lora is scaled by alpha / rank, or alpha / sqrt(rank) if `rank_stabilized`.
        composition: of A in mode lora: `product` W0 (A_d A_u), or `hadamard` W0 * (A_d A_u).
        dropout: of the input of the low-rank factors.
        modules_to_save: modules trained and saved in full.
        d_without_bias: what to do where D is asked for and the layer has no bias: `error`, or `none` (leave D out).
        seed: draws the start of the `up` factors; None: torch's default generator.
    """

    target_modules: str | list[str] | None = field(default="all-linear")
    exclude_modules: str | list[str] | None = field(default=None)
    slots: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_SLOTS))
    paths: dict[str, dict[str, Any]] = field(default_factory=dict)
    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    composition: str = "product"
    dropout: float = 0.0
    modules_to_save: list[str] | None = None
    d_without_bias: str = "error"
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = GLORA_LLM
        if self.composition not in ("product", "hadamard"):
            raise UserError(f"composition is '{self.composition}'; expected product or hadamard.")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        self.path_of("")

    def path_of(self, name: str) -> Path:
        """Return the path of the layer `name`."""

        def build(slots: dict[str, Any]) -> Path:
            return make_path(slots, self.rank, self.alpha, self.rank_stabilized)

        return path_for(name, build(self.slots), {pattern: build(slots) for pattern, slots in self.paths.items()})


class GLoRALinear(nn.Module, BaseTunerLayer):
    """A frozen linear with GLoRA slots.

    Args:
        base_layer: `nn.Linear`, or bitsandbytes' `Linear4bit` or `Linear8bitLt`, with or without bias.
    """

    adapter_layer_names = tuple(f"slot_{slot}" for slot in SLOTS)
    other_param_names = ("composition", "path", "dropout")

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.composition: dict[str, str] = {}
        self.path: dict[str, Path] = {}
        self.dropout: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._unmerged: nn.Module | None = None

    def update_layer(self, adapter_name: str, config: GLoRAConfig, path: Path, generator: Any = None) -> None:
        """Allocate the slots of one adapter.

        Raises:
            UserError: for D on a layer without bias, where it does nothing.
        """
        if config.d_without_bias == "none" and self.bias is None:
            path = path.without("D")
        if path["D"].mode != "none" and self.bias is None:
            raise UserError(
                "Slot D scales the frozen bias b0, and this layer has none, so D would train nothing. "
                "Set D to none, or give it by `paths` to the layers that have a bias."
            )
        self.composition[adapter_name], self.path[adapter_name] = config.composition, path
        self.dropout[adapter_name] = config.dropout
        for slot, spec in path.active():
            made = make_slot(slot, spec, config.composition, self.out_features, self.in_features, generator)
            getattr(self, f"slot_{slot}")[adapter_name] = made
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def slots(self, adapter_name: str) -> Slots:
        """Return the current values of an adapter's slots, with their autograd history."""
        found: dict[str, Any] = {}
        for slot in SLOTS:
            modules = getattr(self, f"slot_{slot}")
            if adapter_name not in modules:
                continue
            mode = modules[adapter_name]
            if isinstance(mode, Lora) and slot != "C":
                key = slot.lower()
                found |= {f"{key}_down": mode.down, f"{key}_up": mode.up, f"{key}_scale": mode.scale}
            else:
                field_of = {"A": "a_gain", "B": "b_shift"}.get(slot, slot.lower())
                found[field_of] = mode.value().reshape(-1)
        return Slots(**found)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return f(x), (..., O), for x (..., I)."""
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            return self._mixed_batch(x, names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
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
        elif x.dtype != self._dtype() and self._dtype().is_floating_point:
            x = x.to(self._dtype())
        dropout = self.dropout[adapter_name]
        dropped = nn.functional.dropout(x, dropout) if dropout and self.training else None
        dtype = x.dtype
        with torch.autocast(device, enabled=False):
            y = glora_linear(
                x,
                lambda: dense_weight(self.base_layer, dtype),
                self.out_features,
                self.bias,
                self.slots(adapter_name),
                self.composition[adapter_name],
                dropped,
            )
        return y if torch.is_autocast_enabled(device) else y.to(given)

    def _dtype(self) -> torch.dtype:
        return compute_dtype(self.get_base_layer())

    def _mixed_batch(self, x: Tensor, names: list[str]) -> Tensor:
        """Rows of one batch through different adapters; `__base__` is the frozen layer (inference only)."""
        if len(names) != len(x):
            raise ValueError(f"adapter_names has {len(names)} entries for a batch of {len(x)} rows")
        y = self.base_layer(x)
        for name in set(names) & set(self.path):
            rows = [index for index, other in enumerate(names) if other == name]
            y[rows] = self._one(x[rows], name).to(y.dtype)
        return y

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Return weight (O, I) and bias (O) with the adapters in them, in float32 (float64 for a float64 base).

        Every adapter acts on the original W0, so their order does not matter.
        """
        dtype = torch.promote_types(self._dtype(), torch.float32)
        w0 = dense_weight(self.get_base_layer(), dtype)
        b0 = None if self.bias is None else self.bias.to(dtype)
        weight, bias = w0.clone(), b0
        for name in adapter_names:
            s = Slots(*(v.detach().to(dtype) if isinstance(v, Tensor) else v for v in self.slots(name)))
            own_weight, own_bias = effective(w0, b0, s, self.composition[name])
            weight += own_weight - w0
            if own_bias is not None:
                bias = own_bias if bias is None else bias + own_bias - (0 if b0 is None else b0)
        return weight, bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base by a dense linear with the adapters in it; the original is kept for an exact `unmerge`.

        Raises:
            ValueError: with `safe_merge`, when a merged value is not finite; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.path]
        if not names:
            return
        if self._unmerged is not None:
            self.base_layer = self._unmerged
        names = self.merged_adapters + names
        weight, bias = self.merged_weight(names)
        if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(f"Merging {', '.join(names)} gives values that are not finite; the adapter seems broken")
        self._unmerged = self.base_layer
        self.base_layer = dense_model.dense_linear(weight, bias, self._dtype())
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Put the original base layer back, bit for bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer, self._unmerged = self._unmerged, None
        self.merged_adapters = []

    def __repr__(self) -> str:
        return "glora_llm." + super().__repr__()


class GLoRAModel(BaseTuner):
    """Injects `GLoRALinear` into a model."""

    prefix = "slot_"
    tuner_layer_cls = GLoRALinear
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: GLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target if isinstance(target, GLoRALinear) else _wrap(target, current_key)
        generator = self._generator(peft_config, adapter_name)
        try:
            layer.update_layer(adapter_name, peft_config, peft_config.path_of(current_key), generator)
        except UserError as error:
            raise UserError(f"{current_key}: {error}") from None
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _generator(self, config: GLoRAConfig, adapter_name: str) -> torch.Generator | None:
        """One seeded generator for all layers of an adapter, so a seed fixes the whole start."""
        if config.seed is None:
            return None
        made: dict[str, torch.Generator] = self.__dict__.setdefault("_generators", {})
        if adapter_name not in made:
            made[adapter_name] = torch.Generator().manual_seed(config.seed)
        return made[adapter_name]

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge:
            dense_model.complete(model)
        return model


def _wrap(target: nn.Module, name: str) -> GLoRALinear:
    if not isinstance(target, nn.Linear):
        raise UserError(
            f"'{name}' is a {type(target).__name__}; GLoRA adapts nn.Linear and bitsandbytes' Linear4bit and "
            "Linear8bitLt. Choose other adapter.targets."
        )
    return GLoRALinear(target)


register_peft_method(name="glora_llm", config_cls=GLoRAConfig, model_cls=GLoRAModel, prefix="slot_")
