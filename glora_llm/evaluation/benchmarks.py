"""`glora-llm evaluate RUN|MODEL --tasks ...`: scores of lm-eval's tasks, beside the run and as a table."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from glora_llm import __version__
from glora_llm.atomic import write_text
from glora_llm.errors import UserError
from glora_llm.evaluation.lm_tasks import load_tasks, require_lm_eval
from glora_llm.evaluation.trained import load_adapted, load_merged, whole_model
from glora_llm.launch import ranks
from glora_llm.models.resolve import resolve
from glora_llm.models.tokenizer import load_tokenizer
from glora_llm.plan.elsewhere import recipe_for_merge
from glora_llm.plan.genome import deployed
from glora_llm.plan.plan import make_plan, require_same_base
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.trained_weights import trained_weights
from glora_llm.report.summary import print_benchmarks
from glora_llm.schema import ModelSection

BATCH = 8  # requests of one forward pass where the command says nothing
SEEDS = (0, 1234, 1234, 1234)  # lm-eval's own: of random, numpy, torch and the few-shot examples
LIBRARIES = ("lm_eval", "transformers", "torch", "datasets", "peft", "bitsandbytes")
LONGEST_NAME = 80  # characters of the name of a result, before what says how it was made


@dataclass(frozen=True)
class Questions:
    """The tasks that lm-eval runs, and its settings.

    Args:
        tasks: names of tasks, groups or tags.
        few_shot: examples before each question; None: what each task says.
        limit: of questions of each task, the first ones; None: all.
        folder: of the user's own YAML tasks.
        batch: requests of one forward pass on one process.
        seed: of random, numpy, torch and the few-shot examples; None: lm-eval's own, `SEEDS`.
    """

    tasks: tuple[str, ...]
    few_shot: int | None = None
    limit: int | None = None
    folder: Path | None = None
    batch: int = BATCH
    seed: int | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The four seeds, in the order of lm-eval's --seed."""
        return SEEDS if self.seed is None else (self.seed,) * len(SEEDS)


@dataclass(frozen=True)
class Weights:
    """The choice of the weights of a run that are evaluated; at most one of these.

    Args:
        merged: the merged model of this folder.
        step: a kept checkpoint.
        genome: of a supernet.
    """

    merged: Path | None = None
    step: int | None = None
    genome: Path | None = None

    def describe(self) -> str:
        """Return it in words for the results."""
        if self.merged is not None:
            return f"merged model {self.merged}"
        return "trained weights, unmerged" if self.step is None else f"checkpoint of step {self.step}, unmerged"

    def suffix(self) -> str:
        """Return what it adds to the name of the results."""
        parts = ("-merged" if self.merged else "", f"-step-{self.step}" if self.step is not None else "")
        return "".join(parts) + (f"-{self.genome.stem}" if self.genome else "")


class Subject(NamedTuple):
    """The model that is asked."""

    model: Any
    tokenizer: Any


def evaluate_tasks(place: Path, questions: Questions, weights: Weights, out: Path | None) -> None:
    """Score a run, or any causal language model, on tasks of lm-eval; print a table and write the results.

    Every process of a launch calls this; the first prints and writes.

    Args:
        place: a run folder, or a model: a folder, a hub id, or embedded:NAME.
        weights: of a run.
        out: the file of the results; None: RUN/eval/NAME.json of a run, none of a model.

    Raises:
        UserError: when lm-eval is not installed, a task is unknown or has no data, or there is no such model.
    """
    run = RunFolder(place) if (place / "recipe.yaml").is_file() else None
    if run is None and weights != Weights():
        raise UserError(f"{place} is no run folder, and --merged, --step, --genome choose among a run's weights.")
    require_lm_eval()
    tasks = load_tasks(questions.tasks, questions.folder)  # before a model is resolved: then the hub is left alone
    processes = ranks.start() if "RANK" in os.environ else None
    with _run_subject(run, weights) if run is not None else nullcontext(_model_subject(place)) as subject:
        results = _ask(subject, tasks, questions)
    is_main_process = processes is None or processes.is_main_process
    if processes is not None:
        ranks.stop()
    if not is_main_process:
        return
    values = _values(results, questions, str(place), weights)
    print_benchmarks(values)
    file = out or (None if run is None else run.path / "eval" / f"{_name(questions, weights)}.json")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(values, indent=1) + "\n")
        print(f"written: {file}", flush=True)


@contextlib.contextmanager
def _run_subject(folder: RunFolder, chosen: Weights) -> Iterator[Subject]:
    """Give what a run trained, on its base and unmerged, or the merged model of a run."""
    recipe = folder.recipe()
    if recipe.data.format == "images" or recipe.head:
        what = "an image classifier" if recipe.data.format == "images" else "a model with a head of classes or numbers"
        raise UserError(f"{folder.path} trained {what}, and lm-eval's tasks are for language models.")
    if chosen.merged is not None:
        yield _model_subject(chosen.merged)
        return
    trained, checkpoint = trained_weights(folder, chosen.step)
    recipe, adapter = deployed(folder, trained, chosen.genome)
    plan = make_plan(recipe_for_merge(folder, recipe))
    if folder.base():
        require_same_base(folder, plan)
    whole = whole_model(plan, folder.model, checkpoint) if recipe.adapter.is_full else nullcontext(adapter)
    with whole as weights:
        yield Subject(load_adapted(plan, weights), load_tokenizer(plan.base.folder))


def _model_subject(place: Path) -> Subject:
    """Return a model of a folder or of the hub, as plain transformers loads it."""
    folder = resolve(ModelSection(name_or_path=str(place))).folder
    return Subject(load_merged(folder), load_tokenizer(folder))


def _ask(subject: Subject, tasks: Sequence[Any], questions: Questions) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    from glora_llm.evaluation.lm_model import SharedLM

    if subject.model.get_output_embeddings() is None:
        raise UserError("lm-eval asks for the likelihood of text, and this model has no head that gives it.")
    random, numpy, torch, few_shot = questions.seeds
    found = simple_evaluate(
        model=SharedLM(subject.model, subject.tokenizer, questions.batch),
        tasks=list(tasks),
        num_fewshot=questions.few_shot,
        limit=questions.limit,
        log_samples=False,
        random_seed=random,
        numpy_random_seed=numpy,
        torch_random_seed=torch,
        fewshot_random_seed=few_shot,
    )
    return found or {}  # the first process of a machine gets them


def _values(results: dict[str, Any], questions: Questions, model: str, weights: Weights) -> dict[str, Any]:
    """Return what is written: scores with standard errors by task, and what they depend on."""
    packages = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "tasks": {name: scores(values) for name, values in results["results"].items()},
        "num_fewshot": results["n-shot"],
        "questions": {name: counts["effective"] for name, counts in results["n-samples"].items()},
        "limit": questions.limit,
        "seed": ",".join(str(seed) for seed in questions.seeds),
        "batch": questions.batch,
        "model": model,
        "weights": weights.describe(),
        "versions": {"glora_llm": __version__, **packages},
        "task_versions": results["versions"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def scores(values: dict[str, Any]) -> dict[str, float]:
    """Return the scores of a task as METRIC and METRIC_stderr; lm-eval's name of a filter, unless none, is kept.

    Args:
        values: of lm-eval, under names such as `acc,none`, `acc_stderr,none` and `exact_match,strict-match`.
    """
    found = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, float | int):
            bare = metric.removesuffix("_stderr")
            named = bare if chosen == "none" else f"{bare},{chosen}"
            found[f"{named}_stderr" if bare != metric else named] = float(value)
    return found


def _name(questions: Questions, weights: Weights) -> str:
    """Return the name of the results: the tasks, and what else differs from the plain case."""
    tasks = re.sub(r"[^\w.+-]+", "_", "+".join(questions.tasks))[:LONGEST_NAME]
    parts = [tasks]
    parts += [f"{questions.few_shot}-shot"] if questions.few_shot is not None else []
    parts += [f"first-{questions.limit}"] if questions.limit is not None else []
    parts += [f"seed-{questions.seed}"] if questions.seed is not None else []
    return "-".join(parts) + weights.suffix()
