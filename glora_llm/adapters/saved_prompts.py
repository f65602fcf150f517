"""A trained prompt in an adapter folder: the prompt, as PEFT has it, and the weights of what gave it (MLP, LSTM)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SAVED = "prompt_embeddings"  # PEFT's name of what a prompt's encoder gives, which is all that it saves
ENCODER = "encoder_weights."  # our names of the encoder's own weights, which PEFT passes over
OF_ENCODER = "prompt_encoder.default."


def learns_prompt(config: Any) -> bool:
    """Tell whether a configuration of PEFT is of a prompt method."""
    return bool(config.is_prompt_learning)


def saved_prompt(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what an adapter folder holds of a prompt's encoder: the prompt, and the weights that gave it.

    PEFT saves the prompt alone, of which the weights of an MLP or LSTM cannot be told: training could not go on.

    Args:
        model: PEFT's model; its parameters may be shared out over processes, and are not read.
        weights: of the model's trained parameters, by name, whole.
    """
    own = {name.removeprefix(OF_ENCODER): value for name, value in weights.items() if name.startswith(OF_ENCODER)}
    if own.keys() == {"embedding.weight"}:
        return {SAVED: own["embedding.weight"]}
    config = model.peft_config["default"]
    with torch.device("meta"):  # draws no random numbers
        encoder = type(model.prompt_encoder["default"])(config)
    encoder.to_empty(device="cpu").load_state_dict(own)
    with torch.no_grad():
        prompt = encoder.eval()(torch.arange(config.num_virtual_tokens)[None])[0]
    return {SAVED: prompt} | {ENCODER + name: value for name, value in own.items()}


def saved_prompt_names(names: Sequence[str]) -> dict[str, str]:
    """Return by the name of each trained parameter of a prompt's encoder the one under which it is saved."""
    own = [name for name in names if name.startswith(OF_ENCODER)]
    if own == [f"{OF_ENCODER}embedding.weight"]:
        return {own[0]: SAVED}
    return {name: ENCODER + name.removeprefix(OF_ENCODER) for name in own}
