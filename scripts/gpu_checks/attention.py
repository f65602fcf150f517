"""Check 3: a packed row is as its samples alone, in loss and gradients, with every attention backend that is here."""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glora_llm import recipe as recipes
from glora_llm.adapters.inject import inject, without_adapter
from glora_llm.data.batch import collate
from glora_llm.data.store import Row as TokenRow
from glora_llm.errors import UserError
from glora_llm.models.load import load_base
from glora_llm.plan.plan import make_plan
from glora_llm.training.batch import to_device
from scripts.gpu_checks.context import Context
from scripts.gpu_checks.report import Row, absent, compared, information

BACKENDS = ("eager", "sdpa", "segments", "varlen", "flex_attention", "flash_attention_2")
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative difference of a gradient
SAMPLE = 200  # tokens of a sample where time is measured


def check(context: Context) -> Iterator[Row]:
    """Compare, then measure the time of a step at several lengths."""
    for backend in BACKENDS:
        try:
            objective, rows = _trainable(context, backend)
        except UserError as error:
            yield absent(backend, " ".join(str(error).split())[:160])
            continue
        yield _isolation(context, backend, objective, rows)
        lengths = (64, 128) if context.is_rehearsal else (1024, 4096, 8192)
        times = {length: _seconds(context, objective, length) for length in lengths}
        text = ", ".join(f"{1000 * seconds:.1f} ms at {length}" for length, seconds in times.items())
        yield information(f"{backend}: forward and backward of one row", text, seconds=times)


def packed_row(tokens: int, vocabulary: int, seed: int) -> TokenRow:
    """Return a full row of seeded random samples, every token a target."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, tokens, dtype=np.int32)
    return TokenRow(ids, np.ones(tokens, dtype=np.bool_), list(range(0, tokens, min(SAMPLE, tokens // 2))))


def _trainable(context: Context, backend: str) -> tuple[Any, list[TokenRow]]:
    """Return an objective with this backend whose adapter has started to learn, and some packed rows."""
    overrides = [
        f"model.name_or_path={context.model}", f"model.attention={backend}", "model.dtype=auto", "data.packing=true",
        "data.max_rows=64", "data.max_tokens=192",
    ]  # fmt: skip
    plan = make_plan(recipes.load("tiny_cpu", overrides))
    base = load_base(plan.recipe.model, plan.base.folder, context.device)
    model = inject(base, plan.recipe.adapter, seed=0, steps=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.data += 0.02 * noise.to(parameter.device, parameter.dtype)
    train: Any = plan.task.train
    return plan.task.objective(without_adapter(model)).train(), [train.row(number) for number in range(2)]


def _isolation(context: Context, backend: str, objective: Any, rows: list[TokenRow]) -> Row:
    samples = [
        TokenRow(row.tokens[start:stop], row.targets[start:stop], [0])
        for row in rows
        for start, stop in pairwise([*row.starts, len(row.tokens)])
    ]
    packed = _gradient(context, objective, [rows])
    alone = _gradient(context, objective, [[sample] for sample in samples])
    worst = float((packed - alone).norm() / alone.norm())
    bound = BOUNDS[context.dtype]
    item = f"{backend}: {len(rows)} packed rows are {len(samples)} samples"
    return compared(item, f"the same loss and gradients within {bound:.0e}", f"{worst:.1e}", worst <= bound)


def _gradient(context: Context, objective: Any, batches: list[list[TokenRow]]) -> Tensor:
    """Return the sum of the losses, and of the gradients of all that is trained, as one vector."""
    objective.zero_grad()
    losses = [objective(**to_device(collate(rows, pad_id=0), context.device)) for rows in batches]
    torch.stack(losses).sum().backward()
    gradients = [p.grad.float().flatten().cpu() for p in objective.parameters() if p.grad is not None]
    return torch.cat([torch.stack(losses).sum().detach().float().cpu()[None], *gradients])


def _seconds(context: Context, objective: Any, tokens: int) -> float:
    vocabulary = objective.model.config.vocab_size
    batch = to_device(collate([packed_row(tokens, vocabulary, seed=0)], pad_id=0), context.device)
    best = float("inf")
    for _ in range(3):
        context.synchronize()
        began = time.perf_counter()
        objective(**batch).backward()
        context.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
