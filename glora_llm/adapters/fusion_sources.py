"""The adapters that AdapterFusion weighs: what can be said of their folders without loading torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from glora_llm.adapters.start import ADAPTER_WEIGHTS, require_same_base, require_weights, saved_config
from glora_llm.errors import UserError
from glora_llm.schema import AdapterSection

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "adapter_fusion"
KEY = "adapter.peft.adapters"
ALIKE = ("rank", "parallel", "activation")  # of the adapters' configurations
KINDS = ("down.weight", "down.bias", "up.weight", "up.bias")
FOLLOWS = ("activation", "bottleneck", "count", "digests", "parallel", "target_modules")  # of the configuration


@dataclass(frozen=True)
class Sources:
    """Two or more bottleneck adapters of one shape at the same places.

    Args:
        folders: that PEFT saved.
        places: full names of the modules that they are at.
        rank: r.
        parallel: they are given the input of their places, not the output.
        activation: f, as transformers names it.
        scales: s of each.
        digests: SHA-256 of each one's weights.
    """

    folders: tuple[Path, ...]
    places: tuple[str, ...]
    rank: int
    parallel: bool
    activation: str
    scales: tuple[float, ...]
    digests: tuple[str, ...]

    def tensors(self) -> "dict[str, dict[str, Tensor]]":
        """Return place -> name of `fused.FROZEN` -> the N adapters' tensors, stacked, with s in U and u."""
        import torch
        from safetensors.torch import load_file

        from glora_llm.glora.path import PEFT_ROOT

        files = [load_file(folder / ADAPTER_WEIGHTS) for folder in self.folders]
        found: dict[str, dict[str, Tensor]] = {}
        for place in self.places:
            found[place] = {}
            for kind in KINDS:
                parts = [file[f"{PEFT_ROOT}{place}.bottleneck_{kind}"] for file in files]
                parts = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
                if kind.startswith("up"):
                    parts = [scale * part for scale, part in zip(self.scales, parts, strict=True)]
                found[place][kind.replace(".", "_")] = torch.stack(parts)
        return found


def read_sources(folders: Sequence[str | Path]) -> Sources:
    """Read what the folders of the adapters say of themselves.

    Raises:
        UserError: for fewer than two, for one named twice, for a folder that holds no bottleneck adapter or a damaged
            one, and for adapters that differ in shape or place.
    """
    places = tuple(Path(folder) for folder in folders)
    if len(places) < 2:
        raise UserError(
            f"{KEY} names {len(places)} folder(s), and a fusion weighs at least two adapters: train them (houlsby, "
            f"pfeiffer, adaptformer or parallel_adapter) and give {KEY}: [RUN1/adapter, RUN2/adapter]. One alone is "
            "trained on by its own method and adapter.weights."
        )
    resolved = [place.absolute() for place in places]
    twice = next((place for number, place in enumerate(resolved) if place in resolved[:number]), None)
    if twice is not None:
        raise UserError(f"{KEY} names {twice} twice.")
    configs = [_config(folder) for folder in places]
    shapes = [_shapes(folder) for folder in places]
    for folder, config, shape in zip(places[1:], configs[1:], shapes[1:], strict=True):
        for name in ALIKE:
            if config[name] != configs[0][name]:
                raise _differ(places[0], folder, name, configs[0][name], config[name])
        if shape != shapes[0]:
            odd = sorted(shape.items() ^ shapes[0].items())[0][0]
            raise _differ(places[0], folder, odd, shapes[0].get(odd, "nothing there"), shape.get(odd, "nothing there"))
    first = configs[0]
    return Sources(
        places,
        tuple(name.partition(".bottleneck_up.bias")[0] for name in shapes[0] if name.endswith(".bottleneck_up.bias")),
        int(first["rank"]),
        bool(first["parallel"]),
        str(first["activation"]),
        tuple(float(config["scale"]) for config in configs),
        tuple(hashlib.sha256((folder / ADAPTER_WEIGHTS).read_bytes()).hexdigest() for folder in places),
    )


def check_sources(section: AdapterSection, fingerprint: str = "") -> None:
    """Check the adapters that a recipe fuses, if it does.

    Args:
        fingerprint: of the recipe's base before it got a new head; empty where it is not known yet. Heads do not count,
            for adapters of different tasks have different ones.

    Raises:
        UserError: as `read_sources`, and for an adapter of another base.
    """
    if section.method != METHOD:
        return
    arguments = section.peft or {}
    for name in FOLLOWS:
        if name in arguments:
            raise UserError(f"adapter.peft.{name} follows from the adapters that are fused: take it away.")
    given = arguments.get("adapters", [])
    if not isinstance(given, list) or not all(isinstance(folder, str) for folder in given):
        raise UserError(f"{KEY}: got {given!r}; expected a list of adapter folders.")
    for folder in read_sources(given).folders:
        require_same_base(folder, fingerprint, KEY, headless=True)
    if section.targets != "all-linear":
        raise UserError(f"adapter.targets {section.targets}: a fusion goes where its adapters are. Take it away.")


def _config(folder: Path) -> dict[str, Any]:
    require_weights(folder, KEY)
    found = saved_config(folder, KEY)
    kind = (found or {}).get("peft_type")
    if found is None or kind != "BOTTLENECK":
        what = "has no adapter_config.json" if found is None else f"is of PEFT type {kind}"
        raise UserError(
            f"{KEY}: {folder} {what}; a fusion weighs bottleneck adapters, of method houlsby, pfeiffer, adaptformer or "
            "parallel_adapter."
        )
    if found["kronecker"]:
        raise UserError(f"{KEY}: {folder} is of method compacter, whose matrices are products: train a dense one.")
    return found


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's own tensors, by their names in the base."""
    from glora_llm.glora.path import PEFT_ROOT  # loads torch

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="np") as file:
            names = [name for name in file.keys() if ".bottleneck_" in name]  # noqa: SIM118
            return {name.removeprefix(PEFT_ROOT): tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise UserError(f"{KEY}: {folder / ADAPTER_WEIGHTS} is no safetensors file: {error}.") from None


def _differ(first: Path, other: Path, name: str, there: Any, here: Any) -> UserError:
    return UserError(
        f"{KEY}: {first} has {name}: {there}, and {other} has: {here}. A fusion weighs adapters of one shape at the "
        "same places. Train them alike."
    )
