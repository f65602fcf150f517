"""The adapter's layers on a model without weights, so that each can be merged by itself."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glora_llm.adapters.even import set_scales
from glora_llm.adapters.inject import inject, tuner_layers
from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.adapters.tuner import ModuleLayer
from glora_llm.errors import UserError
from glora_llm.evaluation.trained import NOT_ENDED, fits
from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.glora.path import PEFT_ROOT
from glora_llm.launch.device import choose_device
from glora_llm.merge.derived import derive
from glora_llm.merge.frozen import trained_weight
from glora_llm.merge.module_layers import merged_part, parts_of, with_real_norms
from glora_llm.models.load import linear_names, meta_model
from glora_llm.models.matrices import MATRICES, as_matrix, dense_twin, in_layout
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
        self.originals = {name: module for name, module in hollow.named_modules() if isinstance(module, MATRICES)}
        self.model: Any = inject(hollow, recipe.adapter, recipe.training.seed, steps)
        saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        if recipe.adapter.method == "adalora":  # the ranks that training left to each layer
            self.model.peft_config["default"].rank_pattern = saved["rank_pattern"]
        if recipe.adapter.method == "glora" and saved.get("scales"):
            set_scales(self.model, saved["scales"])
        result = set_peft_model_state_dict(self.model, dict(self.weights))
        if result.unexpected_keys:
            raise UserError(
                f"{adapter} does not fit the recipe: it has {result.unexpected_keys[0]}, which the recipe has not."
            )
        self.layers = tuner_layers(self.model)
        self.parts = parts_of(self.layers)
        others = {name: layer for name, layer in self.layers.items() if not isinstance(layer, ModuleLayer)}
        odd = [name for name, layer in others.items() if not isinstance(layer.get_base_layer(), MATRICES)]
        if odd and recipe.adapter.method != "ln_tuning":  # whose norms are replaced
            raise UserError(
                f"'{odd[0]}' is no linear, convolution or embedding, and only these can be merged from a run's files: "
                "leave it out of the targets."
            )
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        lacking = sorted(trained & set(result.missing_keys))
        if lacking:
            raise UserError(f"{adapter} does not fit the recipe: it lacks {lacking[0]}.")

    def trained_weight(self, name: str, stored: StoredTensors, dtype: torch.dtype) -> Tensor:
        """Return what the layer `name` computed with in training, (O, I) in float32; only linears are ever quantised.

        It lies on the GPU where there is one with room for the arithmetic, else on the CPU.
        """
        weight = stored.get(f"{name}.weight")
        if name in self.originals:
            weight = as_matrix(self.originals[name], weight).contiguous()
        where = merge_device(weight.numel())
        if name in self.decoder:
            return trained_weight(weight, self.section, dtype, where)
        return weight.to(where, dtype).float()

    def in_layout(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight (O, I) of the layer `name` as the model's files hold it: a Conv1D's is transposed."""
        return in_layout(self.originals[name], weight) if name in self.originals else weight

    def stored_names(self) -> list[str]:
        """Return the names of the modules whose weights the adapter changes."""
        return [name for name, layer in self.layers.items() if not isinstance(layer, ModuleLayer)] + list(self.parts)

    def embedding(self) -> str:
        """Return the name of the module that looks tokens up; empty: there is none."""
        base = self.model.get_base_model()
        try:
            wanted = base.get_input_embeddings()
        except NotImplementedError:
            return ""
        return next((name for name, module in base.named_modules() if module is wanted), "")

    def replaced(self, name: str) -> Tensor | None:
        """Return the trained tensor of `modules_to_save`, or of a norm, that takes the place of the base's `name`."""
        owner, _, kind = name.rpartition(".")
        of_norm = self.weights.get(f"{PEFT_ROOT}{owner}.ln_tuning_layers.{kind}")
        return self.weights.get(PEFT_ROOT + name) if of_norm is None else of_norm

    @torch.no_grad()
    def merged(self, name: str, w0: Tensor, b0: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight (O, I) and bias (O) of the layer `name` with the adapter in it, in float32, on w0's device.

        Raises:
            UserError: when a value is not finite.
        """
        if name in self.parts:
            return merged_part(name, self.parts[name], w0, b0)
        layer = self.layers[name]
        b0 = self.weights.get(f"{PEFT_ROOT}{name}.base_layer.bias", b0)  # trained too with LoRA's `bias` argument
        hollow = layer.base_layer
        layer.base_layer = dense_twin(hollow, w0, None if b0 is None else b0.to(w0.device, w0.dtype), torch.float32)
        layer.to(w0.device)  # the adapter's own tensors
        derive(layer, self.model.peft_config["default"])
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"{name}: a merged value is not finite. {error}") from error
        made: Any = layer.get_base_layer()
        bias = getattr(made, "bias", None)
        weight, bias = dense_weight(made), None if bias is None else bias.data
        layer.base_layer, layer.merged_adapters = hollow, []
        if hasattr(layer, "_unmerged"):
            layer._unmerged = []
        if hasattr(layer, "_base_weight_before_merge"):  # HiRA and PEANuT would keep a copy of every weight
            layer._base_weight_before_merge = None
        layer.to("cpu")
        return weight, bias


def merge_device(numbers: int) -> torch.device:
    """Return where a matrix of that many numbers is merged: the GPU when it has the room, else the CPU."""
    where = choose_device()
    return where if fits(FLOAT32_COPIES * 4 * numbers, where) else torch.device("cpu")


def _hollow(model: nn.Module) -> nn.Module:
    """Give every layer of a model on meta a weight of its shape that takes no memory, so that adapters are real.

    Its bias is real too: a head that is trained in full is copied with it.
    """
    for module in model.modules():
        if isinstance(module, MATRICES):
            zeros = torch.zeros(1).expand(module.weight.shape)
            module.weight = nn.Parameter(zeros, requires_grad=False)
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                module.bias = nn.Parameter(torch.zeros(bias.shape), requires_grad=False)
    return model
