"""GLoRA as a tuner of PEFT: `get_peft_model(model, GLoRAConfig(...))`, save, load, merge, several adapters.

Its PEFT type is GLORA_LLM (GLORA is PEFT's own tuner, which ties A to B and D to E and drops C, D, E on bias-free
layers). Importing this module registers it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn

from glora_llm.errors import UserError
from glora_llm.glora import dense_model
from glora_llm.glora.config import GLoRAConfig
from glora_llm.glora.layer import GLoRALinear


class GLoRAModel(BaseTuner):
    """Injects `GLoRALinear` into a model."""

    prefix = "slot_"
    tuner_layer_cls = GLoRALinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

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
        except UserError as error:
            raise UserError(f"{current_key}: {error}") from None
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject, with a fresh generator even where an adapter of this name was deleted before."""
        self.__dict__.get("_generators", {}).pop(adapter_name, None)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, adapter_names: list[str] | None = None, **__: Any) -> Iterator[None]:
        """PEFT calls this around every forward pass: `adapter_names` must reach the layers by a hook."""
        if adapter_names is None:
            yield
            return
        layers = [module for module in self.modules() if isinstance(module, GLoRALinear)]
        unknown = sorted(set(adapter_names) - {"__base__"} - {name for layer in layers for name in layer.path})
        if self.training or unknown:
            why = "the model is in training mode" if self.training else f"there is no adapter {', '.join(unknown)}"
            raise ValueError(f"adapter_names cannot be used: {why}")

        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return args, kwargs | {"adapter_names": adapter_names}

        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

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


def _wrap(target: nn.Module, name: str, input_dtype: torch.dtype | None) -> GLoRALinear:
    if not isinstance(target, nn.Linear):
        raise UserError(
            f"'{name}' is a {type(target).__name__}; GLoRA adapts nn.Linear and bitsandbytes' Linear4bit and "
            "Linear8bitLt. Choose other adapter.targets."
        )
    return GLoRALinear(target, input_dtype)


register_peft_method(name="glora_llm", config_cls=GLoRAConfig, model_cls=GLoRAModel, prefix="slot_")
