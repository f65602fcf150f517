"""Shipped recipes on the tiny model and on records that a test writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from glora_llm import recipe as recipes
from glora_llm.data.columns import template_fields
from glora_llm.plan.overview import describe
from glora_llm.plan.plan import make_plan
from glora_llm.run import train as run
from glora_llm.schema import DataSection, Recipe

TINY = "model.name_or_path=embedded:tiny-llama"


def rows_of(form: str, count: int, path: Path) -> str:
    """Write rows of a format to a file."""
    words = ["card arrival", "lost card", "top up"]
    rows: dict[str, list[dict[str, Any]]] = {
        "classification": [
            {"text": f"where is card {n}", "instruction": f"Which card is {n}?", "label": words[n % 3]}
            for n in range(count)
        ],
        "prompt_completion": [
            {"question": f"2 and {n}?", "query": f"2 and {n}?", "completion": f"The answer is {2 + n}"}
            for n in range(count)
        ],
        "multiple_choice": [{"question": f"card {n}?", "options": words, "answer": "ABC"[n % 3]} for n in range(count)],
        "text": [{"text": f"the card of customer {n} was {words[n % 3]} in {words[n % 2]}\n"} for n in range(count)],
        "chat": [
            {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"{n}"}]} for n in range(count)
        ],
        "alpaca": [{"instruction": f"add 2 and {n}", "input": "", "output": f"{2 + n}"} for n in range(count)],
    }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[form]), encoding="utf-8")
    return str(path)


def benchmark_rows(data: DataSection, count: int, path: Path) -> str:
    """Write rows with the columns that a benchmark's prompt names, and class numbers."""
    fields, classes = template_fields(data.prompt or "{text}"), len(data.labels or [])
    rows = [{field: f"{field} of card {n}" for field in fields} | {"label": n % classes} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def local(name: str, tmp_path: Path, *more: str) -> Recipe:
    """A shipped recipe on the tiny model and on rows of its format that lie here; nothing else is changed.

    But for the rank of gains by blocks: a row of 64 inputs has one block, so there it is 1. And for the budget of a
    sharing, of which two layers have few, and a teacher, which is the tiny model too.
    """
    plain = recipes.load(name)

    def write(count: int, path: Path) -> str:
        own = plain.data.benchmark is not None and plain.data.format == "classification" and plain.data.labels
        return benchmark_rows(plain.data, count, path) if own else rows_of(plain.data.format, count, path)

    source = write(60, tmp_path / "rows.jsonl")
    model = TINY if plain.model.config is None else "model.tokenizer=train:300"
    changes = [model, f"data.source={source}", f"output.dir={tmp_path / 'run'}"]
    changes += ["data.subset=null", "data.columns=null"]
    if plain.model.from_dense is not None:
        changes.append("model.from_dense.budget=0.6")
    if plain.training.distill is not None:
        changes.append("training.distill.teacher=embedded:tiny-llama")
    if isinstance(plain.data.validation, int | str):
        changes.append("data.validation=12")
    if plain.data.test is not None:
        changes.append(f"data.test={write(9, tmp_path / 'test.jsonl')}")
    rank = 1 if plain.adapter.preset == "lossless4" else plain.adapter.rank
    changed = recipes.load(name, [*changes, f"adapter.rank={rank}", *more])
    assert changed.training.model_copy(update={"distill": plain.training.distill}) == plain.training
    assert changed.adapter == plain.adapter.model_copy(update={"rank": rank})
    return changed


def dry_run(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, str]]:
    """Run a recipe dry; return what it printed, whole and line by line, once that is overview, memory and samples."""
    run.train(recipe, dry_run=True)
    text = capsys.readouterr().out
    described, _, memory = text.partition("\nmemory     ")
    assert described == describe(make_plan(recipe, weights=False, world_size=1))
    assert [text.count(f"\nsample {number}   ") for number in (1, 2, 3)] == [1, 1, 1]
    lines = [line for line in described.splitlines() if not line.startswith("data")]
    return text, dict(line.split(maxsplit=1) for line in [*lines, f"memory {memory.partition(chr(10))[0]}"])
