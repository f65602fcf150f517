"""Reject what does not go with a method that learns a prompt: packed rows, and a context without room for both."""

from typing import Any

from glora_llm.adapters.prompt_arguments import prompt_length
from glora_llm.errors import UserError
from glora_llm.schema import Recipe


def check_packing(recipe: Recipe) -> None:
    """Check that the training samples are in rows of their own.

    Raises:
        UserError: for data.packing with a prompt: every sample gets one, in a row of its own, so long rows of many
            short samples would be computed as many long rows.
    """
    if recipe.data.packing and prompt_length(recipe.adapter):
        raise UserError(
            f"adapter.method {recipe.adapter.method} puts its prompt before every sample, which is computed in a row "
            "of its own, and data.packing puts several samples into one row: set data.packing=false."
        )


def check_room(recipe: Recipe, config: Any) -> None:
    """Check that the longest sample has room behind the prompt.

    Args:
        config: of the model.

    Raises:
        UserError: naming the prompt's length, that of samples, and the model's context.
    """
    length = prompt_length(recipe.adapter)
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not length or context is None or length + recipe.data.max_tokens <= context:
        return
    left = context - length
    advice = f"Set data.max_tokens={left} or less, or a shorter prompt" if left > 1 else "Set a shorter prompt"
    raise UserError(
        f"A prompt of {length} tokens (adapter.peft.num_virtual_tokens) and samples of {recipe.data.max_tokens} "
        f"(data.max_tokens) are longer than the model's context of {context} tokens. {advice}."
    )
