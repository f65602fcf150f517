"""Answers to held-out prompts: greedy, in batches, over all processes, the same however they are shared out."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from glora_llm.data.row_prompt import prompt_and_answer
from glora_llm.data.sample import Tokens
from glora_llm.data.tokenize import ends_of
from glora_llm.errors import UserError
from glora_llm.models.tokenizer import pad_id
from glora_llm.plan.answers import decode
from glora_llm.plan.plan import Plan
from glora_llm.schema import GenerateSection
from glora_llm.tasks.final_number import same_answer

Gather = Callable[[list["Answer"]], list["Answer"]]


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        place: in the seeded order of the rows of its split.
        prompt, reference, generated: texts without special tokens.
    """

    place: int
    prompt: str
    reference: str
    generated: str


def answer_splits(
    plan: Plan,
    model: Any,
    split: str,
    gather: Gather = lambda answers: answers,
    process_rank: int = 0,
    world_size: int = 1,
    is_divided: bool = False,
) -> tuple[dict[str, float], dict[str, list[Answer]]]:
    """Answer the prompts of a split, and score the answers; of `test` those of each test set.

    Args:
        model: of transformers, with its adapter in it, the same on all processes.
        gather: joins the answers of all processes.
        is_divided: the model's weights are shared out (ZeRO 3): every process takes part in every forward pass.

    Returns:
        scores named `SPLIT/...`, and the answers of each set, in the seeded order of its rows, on every process.

    Raises:
        UserError: when the recipe has no such rows.
    """
    section = plan.recipe.evaluation.generate
    assert section is not None
    scores: dict[str, float] = {}
    found: dict[str, list[Answer]] = {}
    for name in plan.splits(split):
        rows = plan.rows(name)
        if rows is None:
            raise UserError(f"The recipe has no {split} rows: set data.{split}.")
        pairs = [prompt_and_answer(rows.row(number)) for number in plan.choice(rows, section.max_rows)]
        answers = _share_out(plan, model, section, pairs, process_rank, world_size, is_divided, f"answer {name}")
        found[name] = sorted(gather(answers), key=lambda answer: answer.place)
        if section.score == "number":
            right = sum(same_answer(answer.reference, answer.generated) for answer in found[name])
            scores[f"{name}/number_match"] = right / len(found[name])
    return scores, found


def _share_out(
    plan: Plan,
    model: Any,
    section: GenerateSection,
    pairs: Sequence[tuple[Tokens, Tokens]],
    process_rank: int,
    world_size: int,
    is_divided: bool,
    title: str,
) -> list[Answer]:
    """Return the answers of this process; one without a batch of its own keeps step where the weights are divided."""
    order = sorted(range(len(pairs)), key=lambda place: (len(pairs[place][0]), place))
    batches = [order[start : start + section.batch] for start in range(0, len(order), section.batch)]
    task: Any = plan.task
    write = Writer(model, task.tokenizer, section, ends_of(task.tokenizer, plan.recipe.data).closing, is_divided)
    answers = []
    for turn in tqdm(
        range(math.ceil(len(batches) / world_size)),
        desc=title,
        disable=None if process_rank == 0 else True,
        leave=False,
    ):
        mine = turn * world_size + process_rank
        if mine >= len(batches) and not is_divided:
            break
        places = batches[min(mine, len(batches) - 1)]
        written = write([pairs[place][0] for place in places])
        if mine < len(batches):
            for place, text in zip(places, written, strict=True):
                prompt, reference = (decode(task, tokens) for tokens in pairs[place])
                answers.append(Answer(place, prompt, reference, text))
    return answers


@dataclass(frozen=True)
class Writer:
    """Greedy decoding of a batch of prompts.

    Args:
        model: of transformers.
        tokenizer: of transformers.
        section: lengths and stop texts.
        ends: ids that end an answer.
        is_divided: a forward pass needs all processes, so each goes on until all are done.
    """

    model: Any
    tokenizer: Any
    section: GenerateSection
    ends: frozenset[int]
    is_divided: bool

    def __call__(self, prompts: Sequence[Tokens]) -> list[str]:
        """Return the answer to each prompt (T), without what ends it."""
        from transformers import GenerationConfig

        width, filler = max(map(len, prompts)), pad_id(self.tokenizer)
        ids = np.full((len(prompts), width), filler, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padding on the left: new tokens follow the prompt
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=self.section.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(self.ends),
            pad_token_id=filler,
            stop_strings=self.section.stop or None,
        )
        where = next(self.model.parameters()).device
        with torch.no_grad(), _answering(self.model, config):
            written: Tensor = self.model.generate(
                input_ids=torch.from_numpy(ids).to(where),
                attention_mask=torch.from_numpy(mask).to(where),
                generation_config=config,
                tokenizer=self.tokenizer,
                synced_gpus=self.is_divided,
            )
        return [self._text(row) for row in written[:, width:].tolist()]

    def _text(self, tokens: list[int]) -> str:
        stop = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens))
        text = self.tokenizer.decode(tokens[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = [place for end in self.section.stop if (place := text.find(end)) >= 0]
        return str(text[: min(ends)] if ends else text).strip()


@contextlib.contextmanager
def _answering(model: nn.Module, config: Any) -> Iterator[None]:
    """Put a model into evaluation mode; its own generation settings, such as a penalty of repetition, play no part."""
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)
