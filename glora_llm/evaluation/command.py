"""`glora-llm evaluate RUN`, and the table that a run ends with."""

from pathlib import Path
from typing import Any

import torch

from glora_llm.errors import UserError
from glora_llm.evaluation.genomes import Passes
from glora_llm.evaluation.scoring import score_rows
from glora_llm.models.families import auto_class
from glora_llm.plan import Plan, make_plan
from glora_llm.run_folder import RunFolder
from glora_llm.subnet import deployed
from glora_llm.tasks.task import on

NOT_ENDED = "holds no model: the run has not ended. Train on, or name a checkpoint by --step."


def evaluate_run(run: Path, split: str, merged: Path | None, genome: Path | None = None) -> None:
    """Score a run's adapter, or its merged model, on one split, and print the scores.

    Raises:
        UserError: when the folder is no run, or the recipe has no such rows.
    """
    folder = RunFolder(run)
    recipe = folder.recipe()
    recipe, trained = (recipe, None) if merged else deployed(folder, folder.trained(recipe), genome)
    plan = make_plan(recipe)
    model = load_adapted(plan, trained) if trained else load_merged(merged or run)
    print_scores(score_model(plan, model, split))


def print_scores(scores: dict[str, float]) -> None:
    """Print scores, a line each."""
    for name, value in scores.items():
        print(f"{name:28s} {value:.4f}")


def device() -> torch.device:
    """Return where a single process computes."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load_adapted(plan: Plan, adapter: Path) -> Any:
    """Return the base as it was trained on, with the adapter of that folder; or the model that was trained as a whole.

    Raises:
        UserError: when the folder holds nothing that was trained.
    """
    from peft import PeftModel

    import glora_llm.glora  # noqa: F401 - registers the tuner
    from glora_llm.models.causal_lm import load_base

    if plan.recipe.adapter.is_full:
        if not (adapter / "config.json").is_file():
            raise UserError(f"{adapter} {NOT_ENDED}")
        return load_base(plan.recipe.model, adapter, device(), zero3=False)
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} holds no adapter: the run has not ended. Train on, or name a checkpoint by --step.")
    base = load_base(plan.recipe.model, plan.base.folder, device(), zero3=False)
    return PeftModel.from_pretrained(base, str(adapter)).get_base_model().eval()


def load_merged(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Return a merged model, loaded by plain transformers (in float32 on a CPU).

    Raises:
        UserError: when the folder holds no model.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no merged model (no config.json): write one by `glora-llm merge RUN --out {folder}`."
        )
    chosen: Any = dtype or ("auto" if torch.cuda.is_available() else torch.float32)
    kind = auto_class(AutoConfig.from_pretrained(folder, local_files_only=True).model_type)
    return kind.from_pretrained(folder, dtype=chosen, local_files_only=True).to(device()).eval()


def score_model(plan: Plan, model: Any, split: str) -> dict[str, float]:
    """Return the scores of a model on one split, in this process alone.

    Raises:
        UserError: when the recipe has no such rows.
    """
    rows = plan.rows(split)
    if rows is None:
        raise UserError(f"The recipe has no {split} rows: set data.{split}.")
    table = score_rows(
        rows.lengths().tolist(),
        lambda indices: plan.batch(rows, indices),
        passes_of(plan, model).score,
        lambda filled: filled,
        plan.recipe.evaluation.batch,
        title=split,
    )
    return plan.task.means(table, split)


def passes_of(plan: Plan, model: Any) -> Passes:
    """Return what a search asks of a model, in this process alone."""
    objective = plan.task.objective(model).eval()

    def score(batch: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            return objective(**on(device(), batch), score=True)

    return Passes(score, lambda batch: objective(**on(device(), batch)))


def print_summary(folder: RunFolder) -> None:
    """Print what a run came to, and where its parts are."""
    from rich.console import Console
    from rich.table import Table

    summary = folder.summary()
    columns = [
        (title, {name.partition("/")[2]: value for name, value in summary[key].items()})
        for key, title in (
            ("test_before", "before"),
            ("test", "after"),
            ("test_genome", "genome"),
            ("test_merged", "merged"),
        )
        if summary.get(key)
    ]
    console = Console(width=100)
    if columns:
        table = Table(title="test rows", title_justify="left")
        table.add_column("score")
        for title, _ in columns:
            table.add_column(title, justify="right")
        for name in columns[-1][1]:
            table.add_row(name, *(f"{scores[name]:.4f}" if name in scores else "" for _, scores in columns))
        console.print(table)
    trained = folder.trained(folder.recipe())
    facts = [
        ("trained parameters", f"{summary['trained_parameters']:,}"),
        ("wall time", f"{summary['seconds'] / 60:.1f} min"),
        ("peak memory", f"{summary['peak_memory_gb']:.2f} GB on the first rank"),
        (trained.name, str(trained)),
        ("merged model", str(folder.path / "merged") if (folder.path / "merged").is_dir() else "not written yet"),
        ("watch", f"tensorboard --logdir {folder.path / 'tensorboard'}"),
    ]
    for name, value in facts:
        console.print(f"{name:20s} {value}", highlight=False)
