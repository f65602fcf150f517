"""Turn a dense model into a VLoRA model folder by truncated SVD, of equal compounds or of groups under a budget."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from glora_llm.atomic import cache_root, make_once, require_new, whole_folder
from glora_llm.errors import UserError
from glora_llm.launch.device import choose_device
from glora_llm.models.calibration import calibrate
from glora_llm.models.families import layers
from glora_llm.models.folder import Sharing, is_ours, write_sharing, write_trained
from glora_llm.models.load import load_base, meta_model
from glora_llm.models.resolve import HUB_SETTINGS, ResolvedModel, resolve
from glora_llm.schema import FromDenseSection, ModelSection
from glora_llm.vlora import (
    Count,
    IncrementFit,
    UnequalSharing,
    VLoRAConfig,
    allocated,
    choose_groups,
    from_dense,
    groups_from_dense,
    require_budget,
)
from glora_llm.vlora.compound import lay_out_compounds
from glora_llm.vlora.config import names
from glora_llm.vlora.groups import Group

OF_THE_WEIGHTS = ("config.json", "model.safetensors.index.json")
CODE = "2"  # raised whenever `made_of_dense` would make another model of the same weights


def from_dense_command(
    model: str, config: VLoRAConfig, ranks: Sequence[int | None], out: Path, base: str = "first"
) -> None:
    """Write a VLoRA folder of a dense model, and print the error of each rank.

    Args:
        model: what model.name_or_path takes.
        config: how layers are to share; its rank is not looked at.
        ranks: the first one is written, the others are only measured; None: each linear's full rank.
        base: of a compound: the weight of its `first` layer, or the `mean` of its layers' weights.

    Raises:
        UserError: when `out` exists, or the model cannot be shared as asked; nothing is written then.
    """
    require_new(out)
    section = ModelSection(name_or_path=model, dtype="float32")
    folder = resolve(section, kind=None).folder
    if is_ours(folder):
        raise UserError(f"{model} is VLoRA already. Make it dense first: glora-llm merge RUN --out DIR.")
    device = choose_device()
    for number, rank in enumerate(ranks):
        made = load_base(section, folder, device)
        stack = list(layers(made))
        sharing = replace(config, rank=rank or _smaller_sides(stack[0], config.targets))
        fits = from_dense(made, stack, sharing, base)
        _print_fits(rank or "full", fits, allocated(made))
        if number == 0:
            with whole_folder(out) as place:
                _write(made, sharing, folder, place)
    print(f"{out}: rank {ranks[0] or 'full'}, as model.name_or_path of a recipe (adapter.method=full trains it)")


def _smaller_sides(layer: nn.Module, targets: Sequence[str] | None) -> dict[str, int]:
    """Return the full rank of each linear that is shared."""
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    return {
        name: min(linear.out_features, linear.in_features)
        for name, linear in linears.items()
        if targets is None or any(names(name, target) for target in targets)
    }


def _write(made: Any, sharing: Sharing, source: Path, out: Path) -> None:
    weights = {name: parameter.detach().float().cpu() for name, parameter in made.named_parameters()}
    write_trained(out, made.config, sharing, weights)
    for file in (file for pattern in HUB_SETTINGS for file in source.glob(pattern)):
        if file.name not in OF_THE_WEIGHTS:
            shutil.copy(file, out)


def _print_fits(rank: int | str, fits: Sequence[IncrementFit], count: Count) -> None:
    """Print the errors of every linear, mean and largest over its layers."""
    print(f"rank {rank}: {100 * count.share:.1f} % of the dense linears' parameters ({count.total / 1e6:.2f} M)")
    print(f"  {'linear':24s} {'lost of the increment':>24s} {'lost of the weight':>24s}   (mean, largest; Frobenius)")
    for name in dict.fromkeys(fit.linear for fit in fits):
        mine = [fit for fit in fits if fit.linear == name]
        lost = [[fit.increment_error for fit in mine], [fit.weight_error for fit in mine]]
        cells = [f"{100 * sum(part) / len(part):13.2f} %, {100 * max(part):5.2f} %" for part in lost]
        print(f"  {name:24s} {cells[0]} {cells[1]}")


def made_of_dense(
    section: ModelSection, base: ResolvedModel, rows: Sequence[Sequence[int]], weights: bool
) -> ResolvedModel:
    """Return the VLoRA model that model.from_dense asks for, made once in the cache.

    Args:
        base: the dense model.
        rows: token ids by which inputs and gradients are measured; none: errors are of the weights alone.
        weights: False makes a folder without weights, whose groups are chosen without looking at any: for a dry run.

    Raises:
        UserError: when the model is VLoRA already, its layers differ, or no sharing comes within the budget.
    """
    settings = section.from_dense
    assert settings is not None
    if is_ours(base.folder):
        raise UserError(f"{base.name} is VLoRA already, and model.from_dense takes a dense model: remove the key.")
    parts = [CODE, base.fingerprint, settings.model_dump(), [list(map(int, row)) for row in rows], weights]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    dense = section.model_copy(update={"from_dense": None, "dtype": "float32", "quantization": "none"})

    def make(place: Path) -> None:
        if weights:
            _make_groups(dense, base.folder, settings, rows, place)
            return
        model = meta_model(dense, base.folder)
        linears = _shared_linears(model, settings.targets)
        write_sharing(choose_groups(list(layers(model)), linears, settings.budget, None), place)
        shutil.copy(base.folder / "config.json", place)

    return ResolvedModel(make_once(cache_root() / f"from-dense-{key[:24]}", make), base.name, base.revision, key)


def _make_groups(
    section: ModelSection, source: Path, settings: FromDenseSection, rows: Sequence[Sequence[int]], place: Path
) -> None:
    model = load_base(section, source, choose_device())
    linears = _shared_linears(model, settings.targets)
    require_budget(list(layers(model)), linears, settings.budget)  # before the minutes that the rest takes
    measured = calibrate(model, linears, rows)
    by = "what their errors do to the loss" if measured.gradients else "their errors, relative to their outputs"
    print(f"choosing groups of layers and ranks for {100 * settings.budget:.4g} % of the linears, by {by}", flush=True)
    sharing = choose_groups(list(layers(model)), linears, settings.budget, measured, partial(print, flush=True))
    fits = groups_from_dense(model, list(layers(model)), sharing, measured)
    _print_groups(sharing, fits)
    _write(model, sharing, source, place)


def _shared_linears(model: Any, targets: Sequence[str] | None) -> list[str]:
    """Return the names of the linears inside a layer that are targets, after checking that all layers could share them.

    Raises:
        UserError: for layers that differ, or a target that is in no layer.
    """
    return list(lay_out_compounds(model, list(layers(model)), VLoRAConfig(targets, None, 1)).ranks)


def _print_groups(sharing: UnequalSharing, fits: Sequence[IncrementFit]) -> None:
    """Print for every linear how many layers share, at which ranks, and the error of the outputs that is left."""
    print(f"  {'linear':24s} layers x rank of each group, and what is lost of the outputs (mean, largest)")
    for name in dict.fromkeys(group.linear for group in sharing.groups):
        groups = _in_words([group for group in sharing.groups if group.linear == name])
        lost = [fit.weight_error for fit in fits if fit.linear == name] or [0.0]
        print(f"  {name:24s} {groups}: {100 * sum(lost) / len(lost):.1f} %, {100 * max(lost):.1f} %", flush=True)


def _in_words(groups: Sequence[Group]) -> str:
    """Return the groups of one linear, from the first layer on: `2x33, 8 dense, 15x87`."""
    words: list[str] = []
    for count, alike in groupby(groups, key=lambda group: group.count):
        mine = list(alike)
        words += [f"{len(mine)} dense"] if count == 1 else [f"{count}x{group.rank}" for group in mine]
    return ", ".join(words)
