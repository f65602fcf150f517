"""Checks of what evaluation.generate needs, before any weight is loaded."""

from pathlib import Path
from typing import Any

import numpy as np

from glora_llm.adapters.prompt_arguments import prompt_length
from glora_llm.data.row_prompt import prompt_and_answer
from glora_llm.errors import UserError
from glora_llm.models.config_file import load_config
from glora_llm.schema import GenerateSection, Recipe
from glora_llm.tasks.final_number import require_answers
from glora_llm.tasks.task import Task

PROMPTED = ("alpaca", "chat", "prompt_completion")


def check_generate(recipe: Recipe) -> None:
    """Check that answers can be generated for these data.

    Raises:
        UserError: for a format without prompts and free answers, and for an adapter that cannot write text.
    """
    if recipe.evaluation.generate is None:
        return
    if recipe.adapter.method == "lora_dropout" and (recipe.adapter.peft or {}).get("ensemble"):
        raise UserError(
            "evaluation.generate writes text, and adapter.peft.ensemble takes the mean of several models, each of "
            "which would need keys and values of its own. Set adapter.peft.ensemble=0, or evaluation.generate=null."
        )
    name, take = recipe.data.format, "or take evaluation.generate away (evaluation.generate=null)."
    if name not in PROMPTED:
        why = {
            "images": "images are classified",
            "text": "running text has no prompts",
            "classification": "label words are scored by likelihood",
            "multiple_choice": "options are scored by likelihood",
        }
        raise UserError(
            f"evaluation.generate answers prompts, and data.format is {name}: {why.get(name, 'it has no answers')}. "
            f"Use {', '.join(PROMPTED)}, {take}"
        )


def check_answers(recipe: Recipe, task: Task, folder: Path, trains: bool) -> None:
    """Check that the test prompts leave room for an answer, and that the references can be scored.

    Args:
        folder: of the base model.
        trains: test rows have to be there; else those of another split may be answered.

    Raises:
        UserError: without test rows; naming the longest prompt, or answers without a number.
    """
    section = recipe.evaluation.generate
    if section is None:
        return
    if trains and not task.tests:
        raise UserError("evaluation.generate answers test prompts: set data.test, or evaluation.generate=null.")
    config = load_config(folder).get_text_config(decoder=True)
    room = getattr(config, "max_position_embeddings", None)
    for name, rows in task.tests.items():
        pairs = [prompt_and_answer(rows.row(index)) for index in range(len(rows))]
        if room is not None:
            longest = max(len(prompt) for prompt, _ in pairs) + prompt_length(recipe.adapter)
            _require_room(name, longest, room, section)
        if section.score == "number":
            require_answers(name, [decode(task, answer) for _, answer in pairs])


def _require_room(name: str, longest: int, room: int, section: GenerateSection) -> None:
    if longest + section.max_new_tokens <= room:
        return
    left = room - longest
    advice = f"Set it to {left} or less" if left > 0 else "Drop long prompts by data.max_tokens and data.overlong=drop"
    raise UserError(
        f"evaluation.generate.max_new_tokens {section.max_new_tokens} leaves no room: the longest {name} prompt has "
        f"{longest} tokens, and the model's context {room}. {advice}."
    )


def decode(task: Any, tokens: "np.ndarray[Any, np.dtype[np.int32]]") -> str:
    """Return tokens as text, without special tokens and surrounding space."""
    text = task.tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()
