"""An exact plain LoRA: no merge, no requantisation, runs wherever LoRA runs.

With A as a product (or none), W0 A_d A_u + B_d B_u = [W0 A_d | B_d] [A_u ; B_u]: a LoRA of rank r_A + r_B. B as a
vector or scalar b adds b_i to every element of row i, b 1^T: rank 1. W0 C + E is its bias (PEFT's `lora_bias`). A as a
vector or scalar scales the rows of W0, and has its rank: no such form.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glora_llm.adapters.config import FACTOR_METHODS
from glora_llm.adapters.methods import unmerged
from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.atomic import require_new, whole_folder
from glora_llm.errors import UserError
from glora_llm.evaluation.progress import progress
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.linear import Slots
from glora_llm.glora.path import PEFT_ROOT, LayerPath
from glora_llm.merge.layers import AdapterLayers
from glora_llm.models.matrices import is_linear, is_transposed
from glora_llm.models.stored import stored_tensors
from glora_llm.plan.plan import Plan


def write_lora(plan: Plan, adapter: Path, out: Path, base_dtype: torch.dtype) -> None:
    """Write an adapter of GLoRA, or one that is a sum of products, as a LoRA adapter of PEFT, in float32.

    Raises:
        UserError: when the adapter is another, or a layer's path has no LoRA form (layers are named).
    """
    method, obstacle = plan.recipe.adapter.method, unmerged(plan.recipe.adapter)
    if method not in ("glora", *FACTOR_METHODS):
        raise UserError(
            f"--to lora exports adapters of glora, {', '.join(FACTOR_METHODS)}; this one is {method} and is in "
            f"{adapter}."
        )
    if obstacle:
        raise UserError(obstacle)
    require_new(out)
    layers = AdapterLayers(plan.recipe, plan.base.folder, adapter, plan.steps)
    paths = _paths(layers.layers) if method == "glora" else {}
    if paths:
        _require_lora_form(layers.layers)
    stored, tensors, ranks = stored_tensors(plan.base.folder, plan.recipe.model, base_dtype), {}, {}
    with_bias = any(path.touches_bias() or path["D"].mode != "none" for path in paths.values())
    for name, layer in progress(list(layers.layers.items()), "export", "layer"):
        bias: Tensor | None = None
        if name in paths:
            w0 = layers.trained_weight(name, stored, base_dtype).cpu()
            b0 = stored.get(f"{name}.bias").float() if f"{name}.bias" in stored else None
            up, down, bias = as_lora(w0, b0, layer.slots("default"))
        else:
            up, down = summed(layer)
        tensors[f"{PEFT_ROOT}{name}.lora_A.weight"], tensors[f"{PEFT_ROOT}{name}.lora_B.weight"] = up, down
        if with_bias:
            tensors[f"{PEFT_ROOT}{name}.lora_B.bias"] = torch.zeros(len(down)) if bias is None else bias
        ranks[name] = len(up)
    tensors |= {
        name: tensor for name, tensor in layers.weights.items() if not any(own in name for own in (".slot_", ".lora_"))
    }  # modules_to_save
    with whole_folder(out) as folder:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS)
        transposed = any(is_transposed(layer.get_base_layer()) for layer in layers.layers.values())
        saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        _write_config(folder, ranks, with_bias, transposed, saved)


@torch.no_grad()
def summed(layer: Any) -> tuple[Tensor, Tensor]:
    """Return A (r, I) and B (O, r), of scaling 1, whose product is the increment of a layer of `adapters.factors`."""
    pairs = list(layer.lora_variant["default"].factors(layer, "default"))
    down = torch.cat([b.float() for _, b in pairs], 1) * layer.scaling["default"]
    return torch.cat([a.float() for a, _ in pairs]).clone(), down


@torch.no_grad()
def as_lora(w0: Tensor, b0: Tensor | None, s: Slots) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return up (r, I), down (O, r) and bias (O) or None of the LoRA that equals the slots.

    Args:
        w0: the frozen weight (O, I).
        b0: the frozen bias (O); D b0 is part of the LoRA's bias.
    """
    ups, downs = [], []
    if s.a_down is not None and s.a_up is not None:
        ups.append(s.a_up)
        downs.append(s.a_scale * (w0 @ s.a_down))
    if s.b_down is not None and s.b_up is not None:
        ups.append(s.b_up)
        downs.append(s.b_scale * s.b_down)
    if s.b_shift is not None:
        ups.append(w0.new_ones(1, w0.shape[1]))
        downs.append(s.b_shift.expand(len(w0))[:, None])
    if ups:
        up, down = torch.cat(ups), torch.cat(downs, 1)
    else:
        up, down = w0.new_zeros(1, w0.shape[1]), w0.new_zeros(len(w0), 1)
    bias = None if s.c is None else w0 @ s.c
    for part in (s.e, None if s.d is None or b0 is None else s.d * b0):
        if part is not None:
            bias = part.expand(len(w0)) if bias is None else bias + part
    return up, down, bias


def _paths(layers: dict[str, GLoRALinear]) -> dict[str, LayerPath]:
    return {name: layer.path["default"] for name, layer in layers.items()}


def _require_lora_form(layers: dict[str, GLoRALinear]) -> None:
    wrong = [name for name, layer in layers.items() if not is_linear(layer.get_base_layer())]
    if wrong:
        raise UserError(
            f"--to lora writes linears alone, and '{wrong[0]}' is none ({len(wrong)} such layers). Merge them instead: "
            "glora-llm merge RUN --out DIR."
        )
    for name, layer in layers.items():
        path = layer.path["default"]
        hadamard = layer.composition["default"] == "hadamard" and path["A"].mode == "lora"
        if hadamard or path["A"].mode not in ("lora", "none"):
            wrong.append(name)
    if wrong:
        raise UserError(
            f"{len(wrong)} layers have no plain LoRA form (A other than lora, or a hadamard A, scales W0 and has "
            f"its rank), the first: {wrong[0]}. Merge them instead: glora-llm merge RUN --out DIR."
        )


def _write_config(
    folder: Path, ranks: dict[str, int], with_bias: bool, transposed: bool, glora: dict[str, object]
) -> None:
    """Scaling is 1 in every layer: alpha = rank. A base of Conv1D layers holds its weights transposed."""
    from peft import LoraConfig

    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {name: r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=other,
        alpha_pattern=other,
        lora_bias=with_bias,
        fan_in_fan_out=transposed,
        target_modules=sorted(ranks),
        modules_to_save=glora.get("modules_to_save"),
        task_type="CAUSAL_LM",
        base_model_name_or_path=glora.get("base_model_name_or_path"),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
