"""Score genomes on validation rows through a supernet, for a search."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist

from glora_llm.evaluation.scoring import Passes, score_chosen
from glora_llm.failpoints import reach
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.path import Genome
from glora_llm.glora.slopes import slopes
from glora_llm.glora.supernet import SearchedLayer, set_paths
from glora_llm.plan.plan import Plan
from glora_llm.schema import SearchSection
from glora_llm.tasks.task import COLUMNS, Rows

COLUMN_OF = {"exact_match": COLUMNS.index("all_correct"), "label_accuracy": COLUMNS.index("among_labels")}


@dataclass
class RowScorer:
    """Scores genomes on rows: whole candidates shared out over processes, or the rows of each one (ZeRO 3).

    Batches are cut in the same way however many processes there are, so the scores do not depend on them.

    Args:
        plan: its validation rows are scored.
        layers: of the supernet, by name.
        numbers: the validation rows that a search counts as 0, 1, ...
        metric: `loss`, `exact_match` or `label_accuracy`.
        passes: the model.
        gather: sums a float64 table over processes.
        process_rank, world_size: of this launch.
        sharded: parameters are partitioned, so all processes must compute every layer together.

    Attributes:
        rows: the validation rows.
        mean_targets: targets of a row in the mean.
        at_once: candidates that are scored side by side.
    """

    plan: Plan
    layers: Mapping[str, SearchedLayer]
    numbers: Sequence[int]
    metric: str
    passes: Passes
    gather: Callable[[torch.Tensor], torch.Tensor]
    process_rank: int = 0
    world_size: int = 1
    sharded: bool = False
    rows: Rows = field(init=False)
    mean_targets: float = field(init=False)
    at_once: int = field(init=False)

    @classmethod
    def of(cls, plan: Plan, layers: Mapping[str, SearchedLayer], settings: SearchSection, *launch: Any) -> "RowScorer":
        """Return the scorer that a search section asks for; `launch` is the rest, from `passes` on."""
        rows = plan.rows("validation")
        assert rows is not None
        return cls(plan, layers, plan.choice(rows, settings.max_rows), settings.metric, *launch)

    def __post_init__(self) -> None:
        rows = self.plan.rows("validation")
        assert rows is not None and rows.role == "validation"
        self.rows = rows
        self.mean_targets = float(np.mean([self.plan.task.targets(rows, number) for number in self.numbers]))
        self.at_once = 1 if self.sharded else self.world_size

    def __call__(self, requests: Sequence[tuple[Genome, NDArray[np.int64]]]) -> list[NDArray[np.float64]]:
        """Return the scores of each request's rows, higher is better."""
        reach("search.before_scores")
        tables = [torch.zeros(len(rows), len(COLUMNS), dtype=torch.float64) for _, rows in requests]
        for index, (genome, rows) in enumerate(requests):
            if self.sharded or index % self.world_size == self.process_rank:
                set_paths(self.layers, genome)
                tables[index] = self._table([self.numbers[row] for row in rows])
        if not self.sharded:
            tables = list(self.gather(torch.cat(tables)).split([len(rows) for _, rows in requests]))
        return [self._values(table) for table in tables]

    def slopes(self, requests: Sequence[tuple[Genome, NDArray[np.int64]]]) -> list[NDArray[np.float64]]:
        """Return each request's first-order importance: by how much `loss` would fall for each choice of each slot."""
        own: dict[int, torch.Tensor] = {}
        for turn in range(math.ceil(len(requests) / self.world_size)):
            index = turn * self.world_size + self.process_rank
            # A process without a request keeps step: sharded layers need all processes.
            values = own[index] = self._slopes(*requests[min(index, len(requests) - 1)])
        table = torch.stack([own.get(index, torch.zeros_like(values)) for index in range(len(requests))])
        return [row.numpy() for row in self.gather(table)]

    def _slopes(self, genome: Genome, rows: NDArray[np.int64]) -> torch.Tensor:
        set_paths(self.layers, genome)
        chosen, recipe = [self.numbers[row] for row in rows], self.plan.recipe
        # In evaluation mode all activations are kept: a model that is trained with checkpointing gets row by row.
        size = 1 if recipe.model.gradient_checkpointing else recipe.training.micro_batch
        batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        layers = {name: layer for name, layer in self.layers.items() if isinstance(layer, GLoRALinear)}
        losses = [partial(self.passes.loss, self.plan.batch(self.rows, batch)) for batch in batches]
        return torch.stack([slopes(layers, loss) for loss in losses]).sum(0) / (len(rows) * self.mean_targets)

    def _table(self, chosen: list[int]) -> torch.Tensor:
        if self.sharded:
            place = (self.gather, self.process_rank, self.world_size)
            return score_chosen(self.plan, self.rows, chosen, self.passes.score, *place)
        return score_chosen(self.plan, self.rows, chosen, self.passes.score)

    def _values(self, table: torch.Tensor) -> NDArray[np.float64]:
        """Return the scores of a table; the mean over all rows of `loss` is minus validation/loss."""
        column = -table[:, 0] / self.mean_targets if self.metric == "loss" else table[:, COLUMN_OF[self.metric]]
        values: NDArray[np.float64] = column.numpy()
        return values

    def agree(self, text: str) -> bool:
        """Tell whether all processes gave the same text."""
        if self.world_size == 1:
            return True
        texts: list[Any] = [None] * self.world_size
        dist.all_gather_object(texts, text)
        return len(set(texts)) == 1
