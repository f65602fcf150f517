"""The adapter's layers on a model without weights, so that each can be merged by itself."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glora_llm.adapters.inject import inject, tuner_layers
from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.adapters.tuner import ModuleLayer
from glora_llm.errors import UserError
from glora_llm.evaluation.trained import NOT_ENDED, fits
from glora_llm.glora.dense_model import dense_linear
from glora_llm.glora.path import PEFT_ROOT
from glora_llm.launch.device import choose_device
from glora_llm.merge.frozen import trained_weight
from glora_llm.merge.module_layers import merged_part, parts_of, with_real_norms
from glora_llm.models.load import linear_names, meta_model
from glora_llm.models.stored import StoredTensors
from glora_llm.schema import Recipe
from glora_llm.vlora import to_dense

FLOAT32_COPIES = 6  # matrices of a layer's size that the arithmetic of a merge holds at once


class AdapterLayers:
    """The layers of a trained adapter, by the name of the linear that they adapt.

    Args:
        recipe: of the run.
        base: folder of the base model.
        adapter: folder that PEFT saved.
        steps: optimizer steps of the run.

    Raises:
        UserError: when the folder has no adapter, or it does not fit the recipe.
    """

    def __init__(self, recipe: Recipe, base: Path, adapter: Path, steps: int):
        from peft import set_peft_model_state_dict

        file = adapter / ADAPTER_WEIGHTS
        if not file.is_file():
            raise UserError(f"{adapter} holds no adapter: {NOT_ENDED}")
        self.weights = load_file(file)
        hollow = with_real_norms(_hollow(to_dense(meta_model(recipe.model, base))))
        self.section, self.decoder = recipe.model, set(linear_names(hollow))
        self.model: Any = inject(hollow, recipe.adapter, recipe.training.seed, steps)
        if recipe.adapter.method == "adalora":  # the ranks that training left to each layer
            saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            self.model.peft_config["default"].rank_pattern = saved["rank_pattern"]
        result = set_peft_model_state_dict(self.model, dict(self.weights))
        if result.unexpected_keys:
            raise UserError(
                f"{adapter} does not fit the recipe: it has {result.unexpected_keys[0]}, which the recipe has not."
            )
        self.layers = tuner_layers(self.model)
        self.parts = parts_of(self.layers)
        others = {name: layer for name, layer in self.layers.items() if not isinstance(layer, ModuleLayer)}
        odd = [name for name, layer in others.items() if not isinstance(layer.get_base_layer(), nn.Linear)]
        if odd:
            raise UserError(
                f"'{odd[0]}' is no linear, and only adapted linears can be merged: leave it out of the targets."
            )
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        lacking = sorted(trained & set(result.missing_keys))
        if lacking:
            raise UserError(f"{adapter} does not fit the recipe: it lacks {lacking[0]}.")

    def trained_weight(self, name: str, stored: StoredTensors, dtype: torch.dtype) -> Tensor:
        """Return what the linear `name` computed with in training, float32 (the output head is never quantised).

        It lies on the GPU where there is one with room for the arithmetic, else on the CPU.
        """
        weight = stored.get(f"{name}.weight")
        where = merge_device(weight.numel())
        if name in self.decoder:
            return trained_weight(weight, self.section, dtype, where)
        return weight.to(where, dtype).float()

    def replaced(self, name: str) -> Tensor | None:
        """Return the trained tensor of `modules_to_save` that takes the place of the base's `name`, if there is one."""
        return self.weights.get(PEFT_ROOT + name)

    @torch.no_grad()
    def merged(self, name: str, w0: Tensor, b0: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight (O, I) and bias (O) of the linear `name` with the adapter in it, in float32, on w0's device.

        Raises:
            UserError: when a value is not finite.
        """
        if name in self.parts:
            return merged_part(name, self.parts[name], w0, b0)
        layer = self.layers[name]
        b0 = self.weights.get(f"{PEFT_ROOT}{name}.base_layer.bias", b0)  # trained too with LoRA's `bias` argument
        hollow = layer.base_layer
        layer.base_layer = dense_linear(w0, None if b0 is None else b0.to(w0.device, w0.dtype), torch.float32)
        layer.to(w0.device)  # the adapter's own tensors
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"{name}: a merged value is not finite. {error}") from error
        linear: nn.Linear = layer.get_base_layer()
        weight, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
        layer.base_layer, layer.merged_adapters = hollow, []
        if hasattr(layer, "_unmerged"):
            layer._unmerged = []
        layer.to("cpu")
        return weight, bias


def merge_device(numbers: int) -> torch.device:
    """Return where a matrix of that many numbers is merged: the GPU when it has the room, else the CPU."""
    where = choose_device()
    return where if fits(FLOAT32_COPIES * 4 * numbers, where) else torch.device("cpu")


def _hollow(model: nn.Module) -> nn.Module:
    """Give every linear of a model on meta a weight of its shape that takes no memory, so that adapters are real.

    Its bias is real too: a head that is trained in full is copied with it.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            zeros = torch.zeros(1).expand(module.out_features, module.in_features)
            module.weight = nn.Parameter(zeros, requires_grad=False)
            if module.bias is not None:
                module.bias = nn.Parameter(torch.zeros(module.out_features), requires_grad=False)
    return model
