"""A training micro batch reads nothing back from the device: every such read would wait for all that was queued."""

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from glora_llm.adapters.inject import inject, without_adapter
from glora_llm.data.batch import collate
from glora_llm.data.label_trie import LabelTrie
from glora_llm.data.store import Row
from glora_llm.evaluation.scoring import score_rows
from glora_llm.models.attention import packed_arguments
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import AdapterSection, ModelSection
from glora_llm.training.batch import to_device
from glora_llm.training.objectives import CausalLMObjective

TRIE = LabelTrie.build([[5, 6, 7], [5, 8, 9], [4, 3, 2]])
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive"}


class OperatorReads(TorchDispatchMode):
    """Counts the operators whose result the host has to wait for: values, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class CopyReads(TorchFunctionMode):
    """Counts the methods by which Python reads a tensor; on a CPU `cpu()` is no operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def objective_of(tiny: ResolvedModel, device: torch.device, **keys: Any) -> CausalLMObjective:
    section = ModelSection(name_or_path="embedded:tiny-llama", quantization="nf4", gradient_checkpointing=True, **keys)
    base = load_base(section, tiny.folder, device)
    slots: Any = {"A": "lora", "B": "lora", "C": "vector", "E": "vector"}
    model = without_adapter(inject(base, AdapterSection(rank=4, slots=slots), 0, 10))
    return CausalLMObjective(model, partial(packed_arguments, model.config._attn_implementation)).train()


def rows(count: int = 8) -> list[Row]:
    """Rows of two samples; the second one is a prompt and a label word."""
    draw = np.random.default_rng(0)
    made = []
    for number in range(count):
        tokens = draw.integers(10, 200, 24 + number).astype(np.int32)
        tokens[-3:] = [5, 6, 7]
        made.append(Row(tokens, np.arange(len(tokens)) >= len(tokens) - 3, [0, 9]))
    return made


@pytest.mark.parametrize(("backend", "expected"), [("auto", {}), ("sdpa", {"_local_scalar_dense": 1})])
def test_a_training_micro_batch_waits_for_nothing(backend: str, expected: dict[str, int], tiny: ResolvedModel) -> None:
    """With transformers' own mask it asks once whether a row is packed."""
    objective = objective_of(tiny, torch.device("cpu"), attention=backend)
    batch = collate(rows(), pad_id=0)
    with OperatorReads() as operators, CopyReads() as copies:
        objective(**batch).backward()
    assert operators.found == expected and copies.found.total() == operators.found.total()
    assert objective.targets(batch) == 24


def test_the_counter_counts() -> None:
    values = torch.ones(3)
    with OperatorReads() as operators, CopyReads() as copies:
        values[values > 0].sum().item()
        values.nonzero()
        bool(values.any())
        values.cpu()
    assert operators.found == {"index": 1, "_local_scalar_dense": 2, "nonzero": 1}
    assert copies.found == {"item": 1, "cpu": 1, "__bool__": 1}


def test_scores_are_read_once_a_batch(tiny: ResolvedModel) -> None:
    """Of 3 targets each, over label words; the number does not grow with them."""
    objective = objective_of(tiny, torch.device("cpu")).eval()
    given = rows()
    batch = collate(given, 0, TRIE)
    with torch.no_grad(), OperatorReads() as operators, CopyReads() as copies:
        objective(**batch, score=True)
    assert not operators.found and not copies.found
    with torch.no_grad(), CopyReads() as copies:
        table = score_rows(
            [len(row.tokens) for row in given], lambda numbers: collate([given[n] for n in numbers], 0, TRIE),
            lambda batch: objective(**batch, score=True), lambda table: table, batch_size=4,
        )  # fmt: skip
    assert copies.found == {"cpu": 2} and table[:, 1].tolist() == [3] * 8


@pytest.mark.gpu
def test_a_training_micro_batch_waits_for_nothing_on_gpu(tiny: ResolvedModel) -> None:
    """torch itself raises at a read."""
    device = torch.device("cuda", 0)
    objective = objective_of(tiny, device, dtype="bfloat16")
    config: Any = objective.model.config
    assert config._attn_implementation == "varlen"
    batch = to_device(collate(rows(), pad_id=0), device)
    objective(**batch).backward()  # whatever is set up once
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(**batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_scores_are_read_once_a_batch_on_gpu(tiny: ResolvedModel) -> None:
    device = torch.device("cuda", 0)
    objective = objective_of(tiny, device, dtype="bfloat16").eval()
    batch = to_device(collate(rows(), 0, TRIE), device)
    with torch.no_grad():
        objective(**batch, score=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            objective(**batch, score=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
