"""The entry of a run in TensorBoard's tab HParams: the settings that runs are compared by, and the final scores."""

import math
from collections.abc import Iterable
from typing import Any

from glora_llm.schema import Recipe
from glora_llm.schema.slots import DEFAULT_SLOTS, PRESETS

TEST = "test"  # the run below the run's own log that holds the test scores


def compared_settings(recipe: Recipe, trained: int) -> dict[str, str | float]:
    """Return the settings by which runs are told apart.

    TensorBoard sorts the columns by name and shows the first five until one asks for more, so the names are chosen for
    their order too.

    Args:
        trained: number of trained parameters.
    """
    adapter, source = recipe.adapter, recipe.data.source
    return {
        "adapter": adapter.method,
        "data": source if isinstance(source, str) else ", ".join(source),
        "learning rate": recipe.training.peak_lr,
        "rank": 0 if adapter.is_full else adapter.rank,
        "slots": _slots_text(recipe),
        "trained parameters": trained,
        "training seed": recipe.training.seed,
    }


def _slots_text(recipe: Recipe) -> str:
    """Return the slots in a few words, such as `A lora, B lora, C, E`: vectors are not named."""
    adapter = recipe.adapter
    if adapter.method != "glora":
        return "none"
    if adapter.genome is not None:
        return "of a genome"
    if adapter.budget is not None:
        return f"chosen within {adapter.budget} by {adapter.predictor}"
    if adapter.is_supernet:
        return "a supernet"
    slots: dict[Any, Any] = dict(PRESETS[adapter.preset] if adapter.preset else adapter.slots or DEFAULT_SLOTS)
    modes = {slot: value if isinstance(value, str) else value.mode for slot, value in slots.items()}
    words = (slot if mode == "vector" else f"{slot} {mode}" for slot, mode in modes.items() if mode != "none")
    text = ", ".join(words)
    return f"{text}; others by adapter.paths" if adapter.paths else text


def start_summary(name: str, settings: dict[str, str | float]) -> Any:
    """Return the summary that a run begins with.

    Args:
        name: of the run, by which its row is called.
    """
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    return hparams_pb(settings, trial_id=name)


def end_summaries(settings: dict[str, str | float], validation: Iterable[str], test: Iterable[str]) -> list[Any]:
    """Return the summaries of a run that has ended: the columns of the tab, and that the run ended well.

    A metric shows the last value of its curve.

    Args:
        settings: of `compared_settings`.
        validation, test: names of the final scores, such as `loss`; both stand under `validation/` in their logs.
    """
    from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, RealInterval, hparams_config_pb
    from torch.utils.tensorboard.summary import hparams as torch_hparams

    metrics = [Metric(f"validation/{name}", group=TEST, display_name=f"test {name}") for name in test]
    metrics += [Metric(f"validation/{name}", display_name=f"validation {name}") for name in validation]
    number = RealInterval(0.0, math.inf)
    columns = [HParam(name, None if isinstance(value, str) else number) for name, value in settings.items()]
    _, _, ended = torch_hparams({}, {})
    return [hparams_config_pb(columns, metrics), ended]
