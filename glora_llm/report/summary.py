"""Print the scores and the summary table that a run ends with."""

from glora_llm.plan.run_folder import RunFolder


def print_scores(scores: dict[str, float]) -> None:
    """Print scores, a line each."""
    for name, value in scores.items():
        print(f"{name:28s} {value:.4f}")


def print_summary(folder: RunFolder) -> None:
    """Print the result of a run, and the places of its parts."""
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
        ("peak memory", f"{summary['peak_memory_gb']:.2f} GB on the first process"),
        (trained.name, str(trained)),
        ("merged model", str(folder.path / "merged") if (folder.path / "merged").is_dir() else "not written yet"),
        ("watch", f"tensorboard --logdir {folder.path / 'tensorboard'}"),
    ]
    for name, value in facts:
        console.print(f"{name:20s} {value}", highlight=False)
