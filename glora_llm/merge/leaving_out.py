"""Leave slots of a trained GLoRA adapter out: the smaller adapter, as a folder of its own."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.errors import UserError
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.path import PEFT_ROOT, Genome, genome_to_json, genome_to_slots
from glora_llm.plan.plan import Plan

LeftOut = Mapping[str, set[str]]  # name of a layer -> its slots that are left out


def slots_of(layers: Mapping[str, GLoRALinear]) -> dict[str, set[str]]:
    """Return the active slots of every layer, by its name."""
    return {name: {slot for slot, _ in layer.path["default"].active()} for name, layer in layers.items()}


def in_words(slots: set[str]) -> str:
    """Return `slot C` or `slots C and E`."""
    names = sorted(slots)
    if len(names) == 1:
        return f"slot {names[0]}"
    return f"slots {', '.join(names[:-1])} and {names[-1]}"


@contextlib.contextmanager
def smaller_adapter(
    plan: Plan, layers: Mapping[str, GLoRALinear], adapter: Path, left_out: LeftOut
) -> Iterator[tuple[Plan, Path]]:
    """Give the plan and the folder of the adapter without some of its slots; the folder is removed again.

    Its paths are stated layer by layer, as of a genome, so that whatever reads an adapter reads this one.

    Args:
        layers: the layers of the adapter.
        adapter: its folder.

    Raises:
        UserError: when no slot would be left.
    """
    genome: Genome = {}
    for name, layer in layers.items():
        path = layer.path["default"]
        for slot in left_out.get(name, ()):
            path = path.without(slot)
        genome[name] = path
    if not any(True for path in genome.values() for _ in path.active()):
        raise UserError("Without these slots nothing of the adapter is left, and that is the base model as it was.")
    composition = next(iter(layers.values())).composition["default"]
    with tempfile.TemporaryDirectory(prefix="glora-without-") as name:
        place = Path(name)
        weights = {key: tensor for key, tensor in load_file(adapter / ADAPTER_WEIGHTS).items() if _stays(key, left_out)}
        save_file(weights, place / ADAPTER_WEIGHTS)
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        config |= {"genome": genome_to_slots(genome)}
        (place / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (place / "genome.json").write_text(genome_to_json(genome), encoding="utf-8")
        update: dict[str, str | None] = {"slots": None, "preset": None, "paths": None, "weights": None}
        update |= {"genome": str(place / "genome.json"), "composition": composition}
        section = plan.recipe.adapter.model_copy(update=update)
        recipe = plan.recipe.model_copy(update={"adapter": section})
        yield dataclasses.replace(plan, recipe=recipe, genome=genome), place


def _stays(key: str, left_out: LeftOut) -> bool:
    """Tell whether a tensor of the adapter's file stays."""
    layer, found, rest = key.removeprefix(PEFT_ROOT).partition(".slot_")
    return not found or rest[0] not in left_out.get(layer, ())
