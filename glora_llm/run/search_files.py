"""The files of a search in RUN/search: a genome for each limit, the archive, figures, and a table of the limits."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from glora_llm.failpoints import reach
from glora_llm.glora.path import genome_to_json, genome_to_slots
from glora_llm.plan.run_folder import RunFolder
from glora_llm.report import search_figures
from glora_llm.schema import SearchSection
from glora_llm.search.archive import Scored, pareto_front
from glora_llm.search.driver import Found
from glora_llm.search.limits import limits
from glora_llm.search.space import Code, Space


def limits_table(results: dict[str, Any], metric: str) -> str:
    """Return the genomes of all limits beside each other, as Markdown.

    Args:
        results: limit -> what `run_search` returns of it.
    """
    names = list(next(iter(results.values()))["test"])
    head = ["limit", "parameters", f"validation score ({metric})", *names, "genome"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for text, found in results.items():
        scores = [f"{value:.4f}" for value in (found["score"], *found["test"].values())]
        lines.append(f"| {text} | {found['parameters']:,} | " + " | ".join(scores) + f" | genome-{text}.json |")
    return "\n".join(lines) + "\n"


def write_search(folder: RunFolder, space: Space, settings: SearchSection, found: dict[str, Found]) -> None:
    """Write what was found within each limit: genomes, archive and figures. RUN/genome.json is the first limit's."""
    reach("search.before_archive")
    folder.search.mkdir(parents=True, exist_ok=True)
    everything: dict[bytes, Scored] = {}
    for text, part in found.items():
        (folder.search / f"genome-{text}.json").write_text(
            genome_to_json(space.genome(part.best.code)), encoding="utf-8"
        )
        everything |= {candidate.code.tobytes(): candidate for candidate in part.candidates}
    first = next(iter(found.values()))
    genome = space.genome(first.best.code)
    folder.write("genome.json", genome_to_json(genome))
    reach("search.after_genome")
    candidates = list(everything.values())
    front = pareto_front(candidates)
    _write_archive(folder.search / "archive.json", space, settings, candidates, front)
    allowed = list(limits(settings).items()) if settings.limit == "parameters" else []
    figures = {
        "pareto": search_figures.pareto(candidates, front, allowed, settings.metric),
        "generations": search_figures.generations(first.history, settings.metric),
        "modes": search_figures.modes(genome),
        "sizes": search_figures.sizes(_shares(space, first.best.code)),
    }
    _show(folder, figures, first)
    reach("search.after_archive")


def _write_archive(
    file: Path, space: Space, settings: SearchSection, candidates: list[Scored], front: list[Scored]
) -> None:
    on_front = {candidate.code.tobytes() for candidate in front}
    entries = [
        {
            "score": candidate.score,
            "parameters": candidate.parameters,
            "cost": candidate.cost,
            "generation": candidate.generation,
            "pareto": candidate.code.tobytes() in on_front,
        }
        | ({"genome": genome_to_slots(space.genome(candidate.code))} if candidate.code.tobytes() in on_front else {})
        for candidate in sorted(candidates, key=lambda c: (c.parameters, -c.score))
    ]
    values = {"metric": settings.metric, "limit": settings.limit, "candidates": entries}
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _shares(space: Space, code: Code) -> dict[str, int]:
    """Return the trainable parameters of every layer."""
    shares = dict.fromkeys((layer.name for layer in space.layers), 0)
    for row, gene in enumerate(space.genes):
        shares[space.layers[gene.layer].name] += int(space.parameters[row, code[row]])
    return shares


def _show(folder: RunFolder, figures: dict[str, Any], found: Found) -> None:
    """Save the figures as PNG, and put them and the course of the search into TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder.path / "tensorboard")) as board:
        for name, figure in figures.items():
            figure.savefig(folder.search / f"{name}.png", dpi=150)
            board.add_image(f"search/{name}", _pixels(figure), dataformats="HWC")
        by_generation = {progress.generation: progress for progress in found.history}
        for generation, progress in by_generation.items():
            if np.isfinite(progress.best):
                board.add_scalar("search/best_score", progress.best, generation)
            board.add_scalar("search/samples", progress.samples, generation)


def _pixels(figure: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
