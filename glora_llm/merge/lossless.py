"""A run on an nf4 base -> an nf4 model folder in which not one 4-bit code has changed.

Where every slot only multiplies rows or blocks of W0, or is a bias of its own (preset lossless4), the merged weight has
the base's codes and other block scales: nothing is unpacked to be quantised again. The scales are written in float32,
their own quantisation undone, and the folder loads in plain transformers with bitsandbytes.
"""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glora_llm.errors import CheckFailed
from glora_llm.evaluation.progress import progress
from glora_llm.evaluation.trained import fits
from glora_llm.glora.block import block_factors
from glora_llm.glora.frozen_weight import block_scales, unpack
from glora_llm.glora.linear import Slots
from glora_llm.launch.device import choose_device
from glora_llm.merge.folder_writer import folder_writer
from glora_llm.merge.layers import AdapterLayers, merge_device
from glora_llm.merge.model_merge import (
    add_untied_head,
    mergeable_layers,
    merged_tensors,
    write_settings,
    zero_biases,
)
from glora_llm.merge.published import REPORT, published
from glora_llm.merge.sample import comparison_batches
from glora_llm.merge.verify import MergeReport, adapted_model, answers, compare, require_within
from glora_llm.models.config_file import load_config
from glora_llm.models.families import auto_class, built_as
from glora_llm.models.fingerprint import stored_bytes
from glora_llm.models.load import keep_quantized_weights, quantization_config
from glora_llm.models.quantised import quantised_linear
from glora_llm.models.stored import StoredTensors, stored_tensors
from glora_llm.plan.lossless import find_losses
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import RunFolder

MOST_LOSS_CHANGE = 1e-3  # nats/token, of a model that computes in float32


def losses_of(plan: Plan, adapter: Path) -> str | None:
    """Return why a merge into nf4 has to quantise again; None: it changes no 4-bit code.

    Args:
        adapter: folder that PEFT saved.
    """
    losses = find_losses(plan.recipe, {})
    if losses:
        return losses
    layers = AdapterLayers(plan.recipe, plan.base.folder, adapter, plan.steps)
    trained = sorted(name for name in layers.decoder if layers.replaced(f"{name}.weight") is not None)
    if trained:
        return f"{trained[0]} was trained in full (adapter.modules_to_save)"
    return find_losses(plan.recipe, {name: layer for name, layer in layers.layers.items() if name in layers.decoder})


def merge_lossless(
    plan: Plan, folder: RunFolder, adapter: Path, out: Path, dtypes: tuple[torch.dtype, torch.dtype], compared: bool
) -> None:
    """Write the nf4 model, count the codes that changed in what was written, and compare it with the unmerged model.

    Args:
        adapter: folder that PEFT saved; `losses_of` found none.
        out: folder to make.
        dtypes: what the base was computed in, and what the written model computes in.
        compared: False: the answers are not compared.

    Raises:
        UserError: when `out` exists, the disk is too small, or the adapter cannot be merged into its family.
        CheckFailed: when a code has changed, or the answers differ by more than the bounds.
    """
    dtype, written = dtypes
    with published(out) as working:
        difference = write_lossless(plan, adapter, working, dtype, written)
        codes, changed = count_changed_codes(plan, working, dtype)
        values: dict[str, Any] = {
            "lossless": {
                "codes": codes,
                "codes_changed": changed,
                "largest_weight_difference": difference,
                "bytes": stored_bytes(working),
            }
        }
        if compared:
            values = _compare(plan, folder, adapter, working, dtype) | values
        (working / REPORT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        _require(plan, values, written)
    _print(out, values, plan.task.scored)


def write_lossless(plan: Plan, adapter: Path, out: Path, dtype: torch.dtype, written: torch.dtype) -> float:
    """Write the nf4 model folder, one tensor of the base in memory at a time.

    Args:
        dtype: what the base was computed in.
        written: of the dense weights, and what the model computes in.

    Returns:
        the largest difference of a written weight from the merged one in float32: rounding.
    """
    layers = mergeable_layers(plan, adapter)
    config = layers.model.get_base_model().config
    stored = stored_tensors(plan.base.folder, plan.recipe.model, dtype)
    difference = 0.0
    with folder_writer(
        out, written, plan.recipe.merge.max_shard_gb, _expected_bytes(stored, layers, written)
    ) as writer:
        biased: set[str] = set()
        for name in progress(stored.names(), "merge to nf4", "tensor"):
            owner = name.removesuffix(".weight")
            is_code = owner in layers.decoder and name != owner
            for place, value in merged_tensors(name, stored, layers, dtype):
                if place == name and is_code:
                    parts, own = _four_bit(owner, _quantised(stored.get(name), plan, dtype), layers, value, written)
                    difference = max(difference, own)
                    for part, tensor in parts.items():
                        writer.add(part, tensor, keep_dtype=True)
                    continue
                writer.add(place, value)
                if place.endswith(".bias"):
                    biased.add(place.removesuffix(".bias"))
        zero_biases(config, layers, layers.decoder, biased, writer)
        add_untied_head(config, layers, stored, writer)
        settings: Any = quantization_config(plan.recipe.model, written, built_as(config))
        settings.bnb_4bit_use_double_quant, settings.bnb_4bit_quant_storage = False, torch.uint8
        config.quantization_config = settings
        write_settings(plan, config, writer.folder, str(written).removeprefix("torch."))
    return difference


def count_changed_codes(plan: Plan, folder: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Return the number of 4-bit codes in a written folder, and how many of them are not the base's.

    Args:
        dtype: what the base was computed in: its files are quantised from it, as in training.
    """
    base, written = stored_tensors(plan.base.folder, plan.recipe.model, dtype), StoredTensors(folder)
    codes = changed = 0
    for name in progress([name for name in written.names() if f"{name}.absmax" in written], "check codes", "tensor"):
        own = _codes(_quantised(base.get(name), plan, dtype))
        found = written.get(name).to(own.device)
        codes += 2 * found.numel()
        if found.shape != own.shape:
            changed += 2 * own.numel()
            continue
        for shift in (0, 4):  # two codes in a byte
            changed += int(((found >> shift) & 15 != (own >> shift) & 15).sum())
    return codes, changed


def load_nf4(folder: Path) -> Any:
    """Return a 4-bit model folder loaded by plain transformers, on the GPU where it fits."""
    where = choose_device()
    where = where if fits(stored_bytes(folder), where) else torch.device("cpu")
    model = auto_class(load_config(folder)).from_pretrained(
        folder, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False,
        device_map={"": where},
    )  # fmt: skip
    keep_quantized_weights(model)
    return model.eval()


def _four_bit(
    name: str, weight: Any, layers: AdapterLayers, merged: Tensor, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """Return what bitsandbytes stores of one merged linear, and the largest difference from its weight in float32."""
    scales = block_scales(weight)
    layer = layers.layers.get(name)
    if layer is not None:
        scales = scales_with_gains(scales, layer.slots("default"))
    state = weight.quant_state
    state.dtype, state.absmax, state.state2, state.offset, state.nested = dtype, scales.reshape(-1), None, None, False
    difference = float((unpack(weight, scales).float() - merged.to(scales.device)).abs().max())
    parts = {f"{name}.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {f"{name}.weight": _codes(weight)} | parts, difference


@torch.no_grad()
def scales_with_gains(scales: Tensor, s: Slots) -> Tensor:
    """Return block scales times what slot A multiplies their blocks by: one factor, one a row, or one a block.

    Args:
        scales: (O, I/64); any shape where A is none or a scalar.
        s: of a layer that loses nothing.
    """
    if s.a_down is not None and s.a_blocks is not None:
        factors = block_factors(s.a_down.to(scales.device), s.a_blocks.to(scales.device), s.a_scale)
    elif s.a_gain is not None:
        gain = s.a_gain.to(scales.device, torch.float32)
        factors = 1 + (gain[:, None] if gain.numel() > 1 else gain)
    else:
        return scales
    return scales * factors


def _quantised(weight: Tensor, plan: Plan, dtype: torch.dtype) -> Any:
    """Return a stored weight (O, I) quantised as it was on loading, bitsandbytes' parameter."""
    where = merge_device(weight.numel())
    return quantised_linear(weight.to(where, dtype), plan.recipe.model, dtype, where).weight


def _codes(weight: Any) -> Tensor:
    """Return the packed codes of a 4-bit weight, uint8 (O I/2, 1), whatever dtype they are stored as."""
    return weight.data.contiguous().view(torch.uint8).reshape(-1, 1)


def _expected_bytes(stored: StoredTensors, layers: AdapterLayers, dtype: torch.dtype) -> int:
    """Return the size of the folder: half a byte a code and 4 bytes a scale, dense weights in `dtype`."""
    quantised = sum(math.prod(stored.shape(f"{name}.weight")) for name in layers.decoder)
    return int((stored.numbers() - quantised) * dtype.itemsize + quantised * (0.5 + 4 / 64))


def _compare(plan: Plan, folder: RunFolder, adapter: Path, out: Path, dtype: torch.dtype) -> dict[str, Any]:
    batches, text = comparison_batches(plan, folder)
    before = answers(lambda: adapted_model(plan, adapter, dtype, "unmerged", False), plan.task, batches)
    return compare(before, answers(lambda: load_nf4(out), plan.task, batches), text).as_dict()


def _require(plan: Plan, values: dict[str, Any], dtype: torch.dtype) -> None:
    changed = values["lossless"]["codes_changed"]
    if changed:
        raise CheckFailed(f"{changed} of {values['lossless']['codes']} 4-bit codes are not the base's: a defect.")
    if "loss_after" not in values:
        return
    bounds = plan.recipe.merge
    if dtype == torch.float32:  # else the rounding of the products is larger
        bounds = bounds.model_copy(update={"max_loss_change": min(bounds.max_loss_change, MOST_LOSS_CHANGE)})
    names = [field.name for field in fields(MergeReport)]
    report = MergeReport(**{name: values[name] for name in names})
    require_within(report, bounds, "Not one 4-bit code has changed, so quantisation is not the cause.")


def _print(out: Path, values: dict[str, Any], scored: str) -> None:
    found = values["lossless"]
    print(
        f"{out}: nf4 without loss: {found['codes_changed']} of {found['codes']:,} 4-bit codes changed, weights within "
        f"{found['largest_weight_difference']:.1e} of the merged ones, {found['bytes'] / 1e6:,.1f} MB",
        flush=True,
    )
    if "loss_after" not in values:
        print(f"{out}: not compared with the unmerged model (--no-compare)")
        return
    print(
        f"{out}: against the unmerged model, on {values['tokens']} {scored} of {values['text']}\n"
        f"  max_abs_logit_diff {values['max_abs_logit_diff']:.2e}  top1_agreement {values['top1_agreement']:.4f}  "
        f"loss_before {values['loss_before']:.4f}  loss_after {values['loss_after']:.4f}",
        flush=True,
    )
