"""The search of a run: after training on all processes, or `glora-llm search RUN` in one."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from glora_llm import recipe as recipes
from glora_llm.adapters.inject import searched_layers
from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.errors import UserError
from glora_llm.evaluation.scoring import Passes, passes_of, score_model
from glora_llm.evaluation.trained import load_adapted
from glora_llm.glora.path import SlotSpec
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
from glora_llm.report.summary import print_scores
from glora_llm.run.further import describe_further
from glora_llm.run.search_files import limits_table, write_search
from glora_llm.run.search_scorer import RowScorer
from glora_llm.schema import SearchSection
from glora_llm.search import cost
from glora_llm.search.archive import Journal
from glora_llm.search.driver import Found, Progress, search
from glora_llm.search.limits import limits
from glora_llm.search.space import LayerShape, Value, space_of
from glora_llm.training.engine import Engine

Test = Callable[[], dict[str, float]]


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
    plan: Plan, folder: RunFolder, model: Any, engine: Engine, processes: Processes, say: Callable[[str], None],
    test: Test,
) -> dict[str, Any] | None:  # fmt: skip
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
    return run_search(plan, folder, model, Passes(engine.score, engine.loss), engine.gather_rows, launch, place, test)


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

    def test() -> dict[str, float]:
        return {} if plan.task.test is None else score_model(plan, model, "test")

    results = run_search(plan, folder, model, passes_of(plan, model), lambda table: table, launch, test=test)
    scores = next(iter(results.values()))["test"]
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
    test: Test = dict,
) -> dict[str, Any]:
    """Search within every limit of the recipe; write genomes, archive and figures; leave the model on the first genome.

    Args:
        gather: sums a table over processes.
        place: process_rank, world_size, and True if parameters are sharded.
        test: scores the test rows, of the genome of every limit once all are chosen.

    Returns:
        by limit: parameters, score, forward passes over all rows, seconds, test scores: for summary.json.

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
    if launch.is_main_process:
        write_search(folder, space, settings, found)
    for text in reversed(found):
        set_paths(layers, space.genome(found[text].best.code))
        results[text]["test"] = test()
    if launch.is_main_process:
        (folder.search / "limits.md").write_text(limits_table(results, settings.metric), encoding="utf-8")
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
