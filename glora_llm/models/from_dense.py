"""Turn a dense model into a VLoRA model folder by truncated SVD."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from glora_llm.atomic import require_new, whole_folder
from glora_llm.errors import UserError
from glora_llm.launch.device import choose_device
from glora_llm.models.families import layers
from glora_llm.models.folder import is_ours, write_trained
from glora_llm.models.load import load_base
from glora_llm.models.resolve import HUB_SETTINGS, resolve
from glora_llm.schema import ModelSection
from glora_llm.vlora import Count, IncrementFit, VLoRAConfig, allocated, from_dense
from glora_llm.vlora.config import names

OF_THE_WEIGHTS = ("config.json", "model.safetensors.index.json")


def from_dense_command(model: str, config: VLoRAConfig, ranks: Sequence[int | None], out: Path) -> None:
    """Write a VLoRA folder of a dense model, and print the error of each rank.

    Args:
        model: what model.name_or_path takes.
        config: how layers are to share; its rank is not looked at.
        ranks: the first one is written, the others are only measured; None: each linear's full rank.

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
        fits = from_dense(made, stack, sharing)
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


def _write(made: Any, sharing: VLoRAConfig, source: Path, out: Path) -> None:
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
