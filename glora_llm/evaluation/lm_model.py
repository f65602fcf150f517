"""lm-eval's model class for a model that is loaded already, whose requests the processes of a launch share."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import distributed as dist


class SharedLM(HFLM):
    """A causal language model of transformers, as lm-eval asks it; every process of a launch holds all of it.

    Each process answers its part of the requests, and all get all answers: lm-eval itself then does the same on every
    process, so that few-shot examples and scores do not depend on how many there are. (lm-eval's own division would
    draw the few-shot examples of each process for its own questions alone.)

    Args:
        model: causal language model, quantised or not, with or without an adapter.
        tokenizer: of the model.
        batch_size: requests of one forward pass on one process.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) of each continuation given its context."""
        return self._share(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text."""
        return self._share(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes behind each context."""
        return self._share(super().generate_until, requests, disable_tqdm)

    @staticmethod
    def _share(answer: Callable[..., list[Any]], requests: Sequence[Any], disable_tqdm: bool) -> list[Any]:
        disable_tqdm = disable_tqdm or not sys.stderr.isatty()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return answer(list(requests), disable_tqdm=disable_tqdm)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        mine = parts(requests, world_size)[rank]
        answers = answer([requests[index] for index in mine], disable_tqdm=disable_tqdm or rank > 0) if mine else []
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, list(zip(mine, answers, strict=True)))
        by_index = dict(pair for part in gathered for pair in part)
        return [by_index[index] for index in range(len(requests))]


def parts(requests: Sequence[Any], world_size: int) -> list[list[int]]:
    """Return which requests each process answers: the options of one question stay together, lm-eval reuses them."""
    questions: dict[tuple[str, int], list[int]] = {}
    for index, request in enumerate(requests):
        questions.setdefault((request.task_name, request.doc_id), []).append(index)
    divided: list[list[int]] = [[] for _ in range(world_size)]
    for number, indices in enumerate(questions.values()):
        divided[number % world_size] += indices
    return divided
