"""Answers that a run generates: their scores, and RUN/samples.jsonl with some of them, before and after training."""

import contextlib
import json
from pathlib import Path
from typing import Any

from torch import distributed as dist

from glora_llm.adapters.inject import without_adapter
from glora_llm.evaluation.generation import Answer, answer_splits
from glora_llm.launch.ranks import Processes
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.build import TrainingParts
from glora_llm.run.saving import write_for_people

SAMPLES = "samples.jsonl"


def answer(plan: Plan, folder: RunFolder, parts: TrainingParts, processes: Processes, when: str) -> dict[str, float]:
    """Return the scores of answers to the test prompts, named `SPLIT/...`; nothing without evaluation.generate.

    Args:
        when: `before` or `after` training: the key of the answers in samples.jsonl.
    """
    section = plan.recipe.evaluation.generate
    if section is None:
        return {}

    def gather(answers: list[Answer]) -> list[Answer]:
        parts_of_all: list[Any] = [None] * processes.world_size
        dist.all_gather_object(parts_of_all, answers)
        return [one for part in parts_of_all for one in part]

    model = without_adapter(parts.model)
    place = processes.process_rank, processes.world_size
    scores, answers = answer_splits(plan, model, "test", gather, *place, is_divided=parts.engine.stage == 3)
    if processes.is_main_process:
        _keep(folder, {name: found[: section.samples] for name, found in answers.items()}, when)
    return scores


def _keep(folder: RunFolder, answers: dict[str, list[Answer]], when: str) -> None:
    """Write answers beside those of the same prompts that were kept before training."""
    file = folder.path / SAMPLES
    kept = {(entry["split"], entry["prompt"]): entry for entry in (_read(file) if when == "after" else [])}
    lines = []
    for name, found in answers.items():
        for one in found:
            entry = {"split": name, "prompt": one.prompt, "reference": one.reference}
            lines.append(
                json.dumps(kept.get((name, one.prompt), {}) | entry | {when: one.generated}, ensure_ascii=False)
            )
    write_for_people(file, "".join(f"{line}\n" for line in lines))


def _read(file: Path) -> list[dict[str, Any]]:
    """Return the entries of samples.jsonl; a damaged line is left out, as no result depends on it."""
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and {"split", "prompt"} <= set(entry):
                entries.append(entry)
    return entries
