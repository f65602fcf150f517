"""Print the scores and the summary table that a run ends with."""

from typing import Any

from glora_llm.plan.run_folder import RunFolder


def print_scores(scores: dict[str, float]) -> None:
    """Print scores, a line each."""
    for name, value in scores.items():
        print(f"{name:28s} {value:.4f}")


def print_benchmarks(values: dict[str, Any]) -> None:
    """Print the scores of lm-eval's tasks with their standard errors.

    Args:
        values: of `evaluation.benchmarks`: `tasks` (name -> METRIC and METRIC_stderr), `num_fewshot` and `questions`.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{values['model']}: {values['weights']}", title_justify="left")
    for title in ("task", "few-shot", "questions", "score", "value", "standard error"):
        table.add_column(title, justify="left" if title in ("task", "score") else "right")
    for task, scores in values["tasks"].items():
        about = [str(values[key].get(task, "")) for key in ("num_fewshot", "questions")]
        for name, value in scores.items():
            if not name.endswith("_stderr"):
                error = scores.get(f"{name}_stderr")
                table.add_row(task, *about, name, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    Console(width=100).print(table)


def print_summary(folder: RunFolder) -> None:
    """Print the scores of a run, skipped steps with a warning, and the places of its parts."""
    from rich.console import Console
    from rich.table import Table

    summary = folder.summary()
    columns = score_columns(summary)
    console = Console(width=100)
    if columns:
        table = Table(title="scores", title_justify="left")
        table.add_column("score")
        for title in columns:
            table.add_column(title, justify="right")
        for name in dict.fromkeys(name for scores in columns.values() for name in scores):
            table.add_row(name, *(f"{scores[name]:.4f}" if name in scores else "" for scores in columns.values()))
        console.print(table)
    skipped, trained = summary.get("skipped_steps", 0), folder.trained(folder.recipe())
    if skipped:
        console.print(f"warning: {skipped} of {summary['steps']} steps were skipped: loss or gradient was not finite")
    facts = [
        ("trained parameters", f"{summary['trained_parameters']:,}"),
        ("wall time", f"{summary['seconds'] / 60:.1f} min"),
        ("peak memory", _peak(summary)),
        (trained.name, str(trained)),
        ("merged model", str(folder.path / "merged") if (folder.path / "merged").is_dir() else "not written yet"),
        ("watch", f"glora-llm watch {folder.path}"),
    ]
    for name, value in facts:
        console.print(f"{name:20s} {value}", highlight=False)


def _peak(summary: dict[str, Any]) -> str:
    """Return the measured peak beside the computed one, where there is one."""
    text, computed = f"{summary['peak_memory_gb']:.2f} GB on the first process", summary.get("predicted_peak_gb")
    return text if computed is None else f"{text} ({computed:.2f} GB computed)"


def score_columns(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return title -> scores by name, of the validations and tests that summary.json holds."""
    titles = {
        "teacher": "teacher",
        "dense": "dense",
        "at_start": "at the start",
        "validation": "validation",
        "test_before": "test before",
        "test": "test after",
        "test_genome": "test genome",
        "test_finetuned": "test finetuned",
        "test_retrained": "test retrained",
        "test_merged": "test merged",
    }
    return {
        title: {name.partition("/")[2]: value for name, value in summary[key].items()}
        for key, title in titles.items()
        if summary.get(key)
    }
