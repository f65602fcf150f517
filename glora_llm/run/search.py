"""The search of a run: after training on all processes, or `glora-llm search RUN` in one."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from glora_llm import recipe as recipes
from glora_llm.adapters.inject import searched_layers
from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.errors import UserError
from glora_llm.evaluation.scoring import Passes, passes_of, score_model
from glora_llm.evaluation.trained import load_adapted
from glora_llm.failpoints import reach
from glora_llm.glora.path import SlotSpec, genome_to_json, genome_to_slots
from glora_llm.glora.supernet import SearchedLayer, set_paths
from glora_llm.launch import ranks
from glora_llm.launch.device import choose_device
from glora_llm.launch.ranks import Processes
from glora_llm.launch.run_lock import locked
from glora_llm.models.load import compute_dtype
from glora_llm.plan.plan import Plan, make_plan, require_same_base
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.search_checks import check_search
from glora_llm.plan.trained_weights import trained_weights
from glora_llm.report import search_figures
from glora_llm.report.summary import print_scores
from glora_llm.run.further import describe_further
from glora_llm.run.search_scorer import RowScorer
from glora_llm.schema import SearchSection
from glora_llm.search import cost
from glora_llm.search.archive import Journal, Scored, pareto_front
from glora_llm.search.driver import Found, Progress, search
from glora_llm.search.limits import limits
from glora_llm.search.space import Code, LayerShape, Space, Value, space_of
from glora_llm.training.engine import Engine


class Launch(NamedTuple):
    """The processes that run a search, as one of them sees them.

    Args:
        is_main_process: this process writes.
        broadcast: value of the main process -> the same value on all processes.
        device: the costs of slots are measured on it.
    """

    is_main_process: bool
    broadcast: Callable[[Any], Any]
    device: torch.device


def search_after_training(
    plan: Plan, folder: RunFolder, model: Any, engine: Engine, processes: Processes, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Search the supernet that this launch trained, on all of its processes; return None if that was done already.

    Raises:
        UserError: as `run_search`.
    """
    launch = Launch(processes.is_main_process, partial(ranks.broadcast, device=processes.device), processes.device)
    done = processes.is_main_process and folder.genome.is_file() and "search" in folder.summary()
    if launch.broadcast(done):
        say(f"the search had ended already: {folder.genome} (`glora-llm search {folder.path}` starts another)")
        return None
    place = (processes.process_rank, processes.world_size, engine.stage == 3)
    return run_search(plan, folder, model, Passes(engine.score, engine.loss), engine.gather_rows, launch, place)


def search_command(run: Path, overrides: Sequence[str]) -> None:
    """Run `glora-llm search`: search a trained supernet in one process, and score the genome on the test rows.

    Raises:
        UserError: when the run is no supernet, has no validation rows or no adapter yet, or a key is not of `search`.
    """
    folder = RunFolder(run)
    foreign = [text for text in overrides if not text.startswith("search.")]
    if foreign:
        raise UserError(f"'{foreign[0]}': only search.* keys may be changed here; the supernet is trained already.")
    start = [] if folder.recipe().search else ["search={}"]
    recipe = recipes.load(str(folder.path / "recipe.yaml"), [*start, *overrides])
    check_search(recipe)
    with locked(folder.path):
        _search_alone(make_plan(recipe), folder)


def _search_alone(plan: Plan, folder: RunFolder) -> None:
    """Search in this process, with the run folder locked."""
    recipe = plan.recipe
    require_same_base(folder, plan)
    model = load_adapted(plan, trained_weights(folder).weights, gradients=True)
    launch = Launch(True, lambda value: value, choose_device())
    results = run_search(plan, folder, model, passes_of(plan, model), lambda table: table, launch)
    scores = {} if plan.task.test is None else score_model(plan, model, "test")
    folder.update_summary({"search": results, "test_genome": scores})
    for text, found in results.items():
        print(
            f"{text}: score {found['score']:.4f} with {found['parameters']:,} parameters, {found['passes']:.1f} passes"
        )
    print_scores(scores)
    print(f"genome: {folder.genome}; pictures and archive: {folder.search}")
    for line in describe_further(recipe, folder):
        print(line)


def run_search(
    plan: Plan,
    folder: RunFolder,
    model: Any,
    passes: Passes,
    gather: Callable[[torch.Tensor], torch.Tensor],
    launch: Launch,
    place: tuple[int, int, bool] = (0, 1, False),
) -> dict[str, Any]:
    """Search within every limit of the recipe; write genomes, archive and figures; leave the model on the first genome.

    Args:
        gather: sums a table over processes.
        place: process_rank, world_size, and True if parameters are sharded.

    Returns:
        by limit: parameters, score, forward passes over all rows, seconds: for summary.json.

    Raises:
        UserError: when a limit cannot be kept, or the journal belongs to another supernet.
    """
    settings = plan.recipe.search or SearchSection()
    layers = searched_layers(model)
    space = space_of(layers, settings, _measured(plan, folder, layers, settings, launch))
    scorer = RowScorer.of(plan, layers, settings, passes, gather, *place)
    journal = _journal(folder, scorer, launch)
    results, found = {}, {}
    for text, limit in limits(settings).items():
        with (
            _closed(plan),
            tqdm(desc=f"search {text}", unit="row", disable=None if launch.is_main_process else True) as bar,
        ):

            def tell(progress: Progress, bar: Any = bar) -> None:
                bar.set_postfix_str(f"best {progress.best:.4f}, generation {progress.generation}", refresh=False)
                bar.update(progress.samples - bar.n)

            found[text] = search(space, settings, limit, scorer, journal, tell)
        results[text] = _summary(found[text], len(scorer.numbers))
    set_paths(layers, space.genome(next(iter(found.values())).best.code))
    if launch.is_main_process:
        _write(folder, space, settings, found)
    return results


def _closed(plan: Plan) -> contextlib.AbstractContextManager[Any]:
    """Close the test rows: a genome is chosen, and they will judge it."""
    with contextlib.ExitStack() as stack:
        for test in plan.task.tests.values():
            stack.enter_context(test.sealed("a search was choosing a genome"))
        return stack.pop_all()


def _measured(
    plan: Plan, folder: RunFolder, layers: dict[str, SearchedLayer], settings: SearchSection, launch: Launch
) -> Value | None:
    """Return the measured cost of a slot, measured once and kept in RUN/search/costs.json; None for parameters."""
    if settings.limit == "parameters":
        return None
    file, table = folder.search / "costs.json", None
    if launch.is_main_process:
        if file.is_file():
            table = json.loads(file.read_text(encoding="utf-8"))
        else:
            tokens = plan.recipe.training.micro_batch * plan.recipe.data.max_tokens
            dtype = compute_dtype(plan.recipe.model, launch.device)
            table = cost.measure(space_of(layers, SearchSection()), tokens, dtype, launch.device)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    costs: cost.Costs = launch.broadcast(table)
    unit = settings.limit

    def value(layer: LayerShape, slot: str, spec: SlotSpec) -> float:
        key = cost.cost_key(layer, slot, spec)
        if key not in costs:
            raise UserError(f"{file} has no cost of '{key}': it was measured for another supernet. Delete it.")
        return costs[key][unit]

    return value


def _journal(folder: RunFolder, scorer: RowScorer, launch: Launch) -> Journal:
    file = folder.search / "journal.jsonl"
    told = None
    if launch.is_main_process:
        adapter = (folder.adapter / ADAPTER_WEIGHTS).read_bytes()
        identity = {
            "supernet": hashlib.sha256(adapter).hexdigest(),
            "rows": hashlib.sha256((scorer.rows.digest() + str(list(scorer.numbers))).encode()).hexdigest(),
            "metric": scorer.metric,
        }
        told = (identity, Journal.read(file))
    identity, lines = launch.broadcast(told)
    return Journal(file if launch.is_main_process else None, identity, len(scorer.numbers), lines)


def _summary(found: Found, rows: int) -> dict[str, Any]:
    top = found.best
    return {
        "parameters": top.parameters,
        "cost": top.cost,
        "score": top.score,
        "candidates": len(found.candidates),
        "passes": found.samples / rows,
        "seconds": found.seconds,
    }


def _write(folder: RunFolder, space: Space, settings: SearchSection, found: dict[str, Found]) -> None:
    """Write what was found: RUN/genome.json is the first limit's."""
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
