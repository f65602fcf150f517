"""GLoRA as a tuner of PEFT: `get_peft_model(model, GLoRAConfig(...))`, save, load, merge, several adapters.

Its PEFT type is GLORA_LLM (GLORA is PEFT's own tuner, which ties A to B and D to E and drops C, D, E on bias-free
layers). Importing this module registers it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    register_peft_method,
)
from torch import nn

from glora_llm.errors import AdapterError, UserError
from glora_llm.glora import dense_model
from glora_llm.glora.config import GLoRAConfig
from glora_llm.glora.conv import GLoRAConv
from glora_llm.glora.embedding import GLoRAEmbedding
from glora_llm.glora.experts import GLoRAExperts, stacks_of
from glora_llm.glora.layer import GLoRALinear
from glora_llm.models.matrices import CONVOLUTIONS, is_linear


class GLoRAModel(BaseTuner):
    """Injects `GLoRALinear` into a model."""

    prefix = "slot_"
    tuner_layer_cls = GLoRALinear
    # for target_modules=None, as LoRA; the default is all-linear
    target_module_mapping: ClassVar[dict[str, list[str]]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

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
        layer = (
            target
            if isinstance(target, GLoRALinear)
            else _wrap(target, current_key, getattr(self.model, "dtype", None))
        )
        generator = self._generator(peft_config, adapter_name)
        try:
            layer.update_layer(adapter_name, peft_config, peft_config.path_of(current_key), generator)
            layer.scales[adapter_name] = (peft_config.scales or {}).get(current_key, {})
        except UserError as error:
            raise AdapterError(f"{current_key}: {error}") from None
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject, with a fresh generator even where an adapter of this name was deleted before."""
        self.__dict__.get("_generators", {}).pop(adapter_name, None)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *_: Any, adapter_names: Sequence[str] | None = None, num_beams: int | None = None, **__: Any
    ) -> Iterator[None]:
        """PEFT calls this around every forward pass and `generate`: `adapter_names` must reach the layers by a hook.

        Layers are those of GLoRA and PEFT's copies of `modules_to_save`. Refusals are those of PEFT's LoRA, in its
        words. Beam search repeats every row `num_beams` times, but for an encoder, which sees the rows once.
        """
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for module in self.modules() if isinstance(module, GLoRALinear) for name in module.path}
        unknown = sorted(set(adapter_names) - {"__base__"} - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        with ExitStack() as stack:
            if isinstance(num_beams, int) and num_beams > 1:
                if not isinstance(adapter_names, list | tuple):
                    raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
                _pass_names(self, [name for name in adapter_names for _ in range(num_beams)], stack)
                encoder = _encoder(self.model)
                if encoder is not None:
                    _pass_names(encoder, adapter_names, stack)  # a later hook overwrites an earlier one
            else:
                _pass_names(self, adapter_names, stack)
            yield

    def _generator(self, config: GLoRAConfig, adapter_name: str) -> torch.Generator | None:
        """One seeded generator for all layers of an adapter, so a seed fixes the whole start."""
        if config.seed is None:
            return None
        made: dict[str, torch.Generator] = self.__dict__.setdefault("_generators", {})
        if adapter_name not in made:
            made[adapter_name] = torch.Generator().manual_seed(config.seed)
        return made[adapter_name]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
        """Replace as PEFT does, which moves `weight` and `bias` along; experts have none, and come back as they are."""
        if isinstance(child, GLoRAExperts) and not hasattr(new_module, "base_layer"):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge:
            dense_model.complete(model)
        return model


def _pass_names(module: nn.Module, names: Sequence[str], stack: ExitStack) -> None:
    """Give `adapter_names` to every forward pass of the layers inside `module`, until the stack is closed."""

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"adapter_names": names}

    for layer in module.modules():
        if isinstance(layer, GLoRALinear | AuxiliaryTrainingWrapper):
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _encoder(model: Any) -> nn.Module | None:
    """Return the encoder of an encoder-decoder; None for other models, whose `get_encoder` returns themselves."""
    encoder: nn.Module | None = model.get_encoder() if hasattr(model, "get_encoder") else None
    return None if encoder is model else encoder


# Bases that are wrapped as they are: a subclass with a forward pass of its own computes something else of its weight.
KINDS: dict[type[nn.Module], type[GLoRALinear]] = {
    **dict.fromkeys(CONVOLUTIONS, GLoRAConv),
    nn.Embedding: GLoRAEmbedding,
}


def _wrap(target: nn.Module, name: str, input_dtype: torch.dtype | None) -> GLoRALinear:
    if is_linear(target):
        return GLoRALinear(target, input_dtype)
    if stacks_of(target):
        return GLoRAExperts(target, input_dtype)
    why = ""
    for base, layer in KINDS.items():
        if isinstance(target, base):
            why = _other_function(target, base)
            if not why:
                return layer(target, input_dtype)
    kind = str(target).partition("\n")[0]
    raise AdapterError(
        f"Target module {kind} is not supported. '{name}' is a {type(target).__name__}{why}; GLoRA adapts nn.Linear, "
        "transformers' Conv1D, bitsandbytes' Linear4bit and Linear8bitLt, nn.Conv1d, nn.Conv2d, nn.Conv3d, "
        "nn.Embedding and stacked experts. Choose other adapter.targets."
    )


def _other_function(target: Any, base: Any) -> str:
    """Return what a layer computes beside the function of its kind, in words; empty: nothing."""
    if type(target).forward is not base.forward or "forward" in vars(target):
        return f", whose forward pass is not that of {base.__name__}"
    if isinstance(target, nn.Embedding) and target.max_norm is not None:
        return " with max_norm, which rewrites its weight in every forward pass"
    return ""


register_peft_method(name="glora_llm", config_cls=GLoRAConfig, model_cls=GLoRAModel, prefix="slot_")
