"""A run as a part of a report's page: what was trained, what came of it, and how to get it again."""

from statistics import median
from typing import Any

from glora_llm.report import page_figures as figures
from glora_llm.report.comparison import in_words
from glora_llm.report.page_blocks import Facts, Part, Picture, Table, Text, duration, gigabytes, number, score
from glora_llm.report.page_provenance import provenance
from glora_llm.report.page_results import evaluation_tables, frontier, merge_blocks, samples, search_table
from glora_llm.report.page_svg import inline_svg
from glora_llm.report.run_record import RunRecord, Series
from glora_llm.report.structure import Structure, read_structure
from glora_llm.report.structure_svg import modes, structure_svg, summary_rows
from glora_llm.report.summary import score_columns
from glora_llm.schema.benchmarks import benchmark_of
from glora_llm.schema.scores import SCORES

# The score that a run is judged by, where its recipe names none.
FIRST_SCORES = ("label_accuracy", "accuracy", "exact_match", "perplexity", "loss")
NOT_SCORES = ("loss", "perplexity")


def run_part(run: RunRecord, title: str, name: str) -> Part:
    """Return the part of a run.

    Args:
        title: its heading.
        name: of letters, digits and hyphens, unique in the page.
    """
    part = Part(title, name, _sentence(run), _tiles(run))
    structure = read_structure(run)
    part.add("State", *_state(run))
    part.add("Scores", _score_table(run), _meanings(run), *evaluation_tables(run))
    part.add("Training", *_training(run, name))
    part.add("Speed and memory", *_speed(run, name), _memory(run))
    part.add("What was trained, layer by layer", *_structure(structure, name))
    part.add("Parameters by part", *_parameters(structure, name))
    part.add("Search", search_table(run), frontier(run, name))
    part.add("Before and after", samples(run))
    part.add("Merge", *merge_blocks(run))
    part.add("How it was made", *provenance(run))
    return part


def main_score(run: RunRecord) -> tuple[str, str, float] | None:
    """Return the score that a run is judged by: where it was measured, its name, and its value.

    It is the first one of the recipe's metrics or of its benchmark, else the first of a usual order.
    """
    recipe = run.recipe
    chosen = recipe.evaluation.metrics or (benchmark_of(recipe.data.benchmark).metrics if recipe.data.benchmark else ())
    columns = score_columns(run.summary)
    for title in ("test after", "validation"):
        found = columns.get(title, {})
        ends = {name.rpartition("/")[2]: name for name in reversed(found)}  # of several test sets the first
        higher = [end for end in ends if end in SCORES and SCORES[end].higher and end not in FIRST_SCORES]
        for end in (*chosen, *FIRST_SCORES[:3], *higher, *FIRST_SCORES[3:]):
            if end in ends:
                return title, ends[end], found[ends[end]]
    return None


def steps_in_words(run: RunRecord) -> str:
    """Return how far a run came: `40 steps`, or `step 12 of 40`."""
    if "steps" in run.summary:
        return f"{number(run.summary['steps'])} steps"
    total = run.recipe.training.steps
    return f"step {run.last_step:,} of {f'{total:,}' if total else f'{run.recipe.training.epochs} epochs'}"


def method_in_words(run: RunRecord) -> str:
    """Return the adapter's method with what is special about it."""
    adapter = run.recipe.adapter
    if run.recipe.vlora is not None:
        shared = run.recipe.vlora
        return (
            f"VLoRA (rank {in_words(shared.rank)}, {in_words(shared.layers_per_compound or 'all')} layers a compound)"
        )
    if adapter.is_full:
        return "full training"
    if adapter.method == "noah" and (adapter.is_supernet or adapter.genome):
        return "a NOAH supernet" if adapter.is_supernet else "NOAH (genome)"
    if adapter.method != "glora":
        return f"{adapter.method} of rank {adapter.rank}"
    if adapter.is_supernet:
        return "a GLoRA supernet"
    if adapter.genome and (run.folder.path / "structure").is_dir():
        return "GLoRA (a structure within a budget)"
    what = f"preset {adapter.preset}" if adapter.preset else "genome" if adapter.genome else f"rank {adapter.rank}"
    return f"GLoRA ({what})"


def _sentence(run: RunRecord) -> str:
    recipe = run.recipe
    model, data = recipe.model, recipe.data
    called = run.base.get("name") or model.name_or_path or "a new model"
    stored = "" if model.quantization == "none" else f" in {model.quantization}"
    source = data.source if isinstance(data.source, str) else ", ".join(data.source)
    text = (
        f"{method_in_words(run)} on {called}{stored}, trained on {source} (format {data.format}): "
        f"{steps_in_words(run)} of {recipe.training.global_batch} samples, peak learning rate "
        f"{recipe.training.peak_lr:g}."
    )
    return " ".join(f"{one[:1].upper()}{one[1:].rstrip('.')}." for one in (recipe.description, text) if one)


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    summary, tiles = run.summary, []
    found = main_score(run)
    if found:
        where, name, value = found
        before = score_columns(summary).get("test before", {}).get(name) if where == "test after" else None
        more = f"{score(before)} before training" if before is not None else where
        tiles.append((name.replace("_", " "), score(value), more))
    if "trained_parameters" in summary:
        tiles.append(("trained parameters", number(summary["trained_parameters"]), run.recipe.adapter.method))
    if "seconds" in summary:
        tiles.append(("wall time", duration(summary["seconds"]), steps_in_words(run)))
    if "peak_memory_gb" in summary:
        tiles.append(("peak memory", gigabytes(summary["peak_memory_gb"]), "first process"))
    speed = run.series.get(f"train/{run.unit}_per_second")
    if speed is not None and len(speed.finite):
        tiles.append((f"{run.unit} per second", number(median(speed.finite.tolist())), "median of the steps"))
    return tiles


def _state(run: RunRecord) -> list[Text]:
    texts = []
    if not run.last_step:
        texts.append("No step has been logged yet: the run has not begun to train, or has lost its metrics.jsonl.")
    elif not run.folder.has_ended:
        texts.append(f"The run has not ended: {steps_in_words(run)}. Scores of the test follow at the end.")
    if run.failure:
        said = run.failure.get("error") or run.failure.get("said") or "see failure.json"
        texts.append(f"The last launch failed (process {run.failure.get('process_rank', '?')}): {said}")
    if run.damaged:
        lines = "1 line" if run.damaged == 1 else f"{run.damaged:,} lines"
        texts.append(f"{lines} of metrics.jsonl say no step and are left out (a killed run may cut off its last one).")
    skipped = run.summary.get("skipped_steps")
    if skipped:
        texts.append(f"{skipped} of {run.summary['steps']} steps were skipped: loss or gradient was not finite.")
    return [*(Text(text, is_warning=True) for text in texts), *(Text(text) for text in _ending(run))]


def _ending(run: RunRecord) -> list[str]:
    """Return in words why a run ended early, which weights are its result, and what it forgot, where it says so."""
    best, deployed, early = (run.summary.get(key) for key in ("best", "deployed_step", "stopped_early"))
    texts = [f"Training ended early: {early}."] if early else []
    if isinstance(best, dict) and deployed is not None:
        which = (
            f"The best validation ({best.get('score')} {score(best.get('value'))}) was after step {best.get('step')}"
        )
        texts.append(f"{which}; the result are the weights after step {deployed}.")
    forgetting = run.summary.get("forgetting")
    if isinstance(forgetting, dict) and {"before", "after"} <= forgetting.keys():
        before, after = (score(forgetting[key]) for key in ("before", "after"))
        texts.append(
            f"Loss on a text that the run did not see (nats a token): {before} before, {after} after training."
        )
    return texts


def _score_table(run: RunRecord) -> Table | None:
    columns = score_columns(run.summary)
    if not columns:
        return None
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    rows = [[_named(name), *(score(column.get(name)) for column in columns.values())] for name in names]
    return Table("Scores (↑: higher is better, ↓: lower)", ["score", *columns], rows)


def _meanings(run: RunRecord) -> Facts | None:
    """Return what each score is, folded."""
    names = dict.fromkeys(name for scores in score_columns(run.summary).values() for name in scores)
    found = [(name, SCORES[name.rpartition("/")[2]].meaning) for name in names if name.rpartition("/")[2] in SCORES]
    return Facts(found, "What the scores are") if found else None


def _named(name: str) -> str:
    found = SCORES.get(name.rpartition("/")[2])
    return f"{name}\N{NO-BREAK SPACE}{'↑' if found.higher else '↓'}" if found else name


def _picture(figure: Any, title: str, name: str, caption: str = "") -> Picture:
    return Picture(inline_svg(figure, title, name), f"{title}. {caption}".strip())


def _training(run: RunRecord, name: str) -> list[Picture]:
    pictures, series = [], run.series
    both = [series[key] for key in ("train/loss", "validation/loss") if key in series]
    if both:
        caption = figures.rule(both, smoothed=True)
        pictures.append(_picture(figures.loss(run), "Loss by step", f"{name}-loss", caption))
    scored = {
        key.partition("/")[2]: values
        for key, values in series.items()
        if key.startswith("validation/") and key.partition("/")[2] not in NOT_SCORES and len(values.steps) > 1
    }
    shares = {key: values for key, values in scored.items() if not len(values.finite) or abs(values.finite).max() <= 1}
    if shares:
        title = "Scores of the validation by step"
        pictures.append(
            _picture(figures.scores(shares, "Score"), title, f"{name}-scores", figures.rule([*shares.values()]))
        )
    for place, (key, values) in enumerate((pair for pair in scored.items() if pair[0] not in shares), 1):
        drawn = figures.scores({key: values}, key)
        pictures.append(_picture(drawn, f"{key} of the validation", f"{name}-score-{place}", figures.rule([values])))
    for key, title in (("train/lr", "Learning rate"), ("train/grad_norm", "Norm of the gradient before clipping")):
        if key in series:
            drawn = figures.curve(series[key], title.partition(" of")[0] if key == "train/grad_norm" else title)
            drawn.axes[0].set_ylabel("Gradient norm" if key == "train/grad_norm" else "Learning rate")
            pictures.append(_picture(drawn, title, f"{name}-{key[6:8]}", figures.rule([series[key]])))
    steps = {key.rpartition("_")[2]: float(one.values[-1]) for key, one in series.items() if "vlora/increment" in key}
    if steps:
        drawn = figures.by_layer(steps, "Norm of the increment")
        pictures.append(_picture(drawn, "What each layer adds to the one before it, at the end", f"{name}-increments"))
    return pictures


def _speed(run: RunRecord, name: str) -> list[Picture]:
    pictures: list[Picture] = []
    speed: Series | None = run.series.get(f"train/{run.unit}_per_second")
    if speed is not None:
        drawn = figures.curve(speed, f"{run.unit.capitalize()} per second", zero=True)
        pictures.append(_picture(drawn, "Throughput by step", f"{name}-speed", figures.rule([speed])))
    memory = run.series.get("train/peak_memory_gb")
    if memory is not None:
        predicted = run.summary.get("predicted_peak_gb")
        line = ("computed before the run", float(predicted)) if predicted else None
        drawn = figures.curve(memory, "Peak memory so far (GB)", line, zero=True)
        pictures.append(
            _picture(drawn, "Memory of the first process by step", f"{name}-memory", figures.rule([memory]))
        )
    return pictures


def _memory(run: RunRecord) -> Table | None:
    summary = run.summary
    if "peak_memory_gb" not in summary:
        return None
    rows = [
        ["measured peak", gigabytes(summary["peak_memory_gb"])],
        ["computed peak", gigabytes(summary.get("predicted_peak_gb"))],
        ["peak while loading", gigabytes(summary.get("load_peak_gb"))],
        ["parameters at rest", gigabytes(summary["bytes_per_rank"] / 1e9) if "bytes_per_rank" in summary else "–"],
    ]
    return Table("Memory of the first process", ["", "size"], rows)


def _structure(structure: Structure | None, name: str) -> list[Any]:
    if structure is None or not structure.cells:
        return []
    drawn = structure_svg(structure, f"{name}-structure")
    assert drawn is not None  # there are cells
    caption = f"Rows are linears and their slots, columns layers (read from {structure.source})."
    head = ["linear", "layers", *(f"slot {slot}" if len(slot) == 1 else slot for slot in structure.slots)]
    rows = summary_rows(structure)
    picture = Picture(drawn, caption, wide=True, legend=modes(structure))
    return [picture, Table("In words (in brackets: layers)", head, rows)]


def _parameters(structure: Structure | None, name: str) -> list[Any]:
    if structure is None or not structure.total:
        return []
    total = structure.total
    blocks: list[Any] = []
    for title, counts in (("slot", structure.by_slot), ("kind of linear", structure.by_kind)):
        if len(counts) < 2:
            continue
        rows = [[key, f"{count:,}", f"{count / total:.1%}"] for key, count in counts.items()]
        blocks.append(Table(f"Trained parameters by {title}", [title, "parameters", "share"], rows))
    if len(structure.by_layer) > 1:
        drawn = figures.by_layer(structure.by_layer, "Trained parameters")
        blocks.append(_picture(drawn, f"Trained parameters by layer, {total:,} together", f"{name}-layers"))
    return blocks
