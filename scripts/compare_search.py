"""The genome that a search found against the best single path for all layers, with the weights of the same supernet.

  python scripts/compare_search.py RUN [RUN ...]

For each run: every path of which all layers together keep the limit is ranked by what is fitted to all that the search
scored (RUN/search/journal.jsonl); the best 12 are scored on all validation rows, and the best of them and the genome on
the test rows. Prints a Markdown line for each, with means and ranges over the runs at the end.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from tqdm import tqdm

from glora_llm.adapters.config import read_genome
from glora_llm.adapters.inject import adapted_layers
from glora_llm.errors import UserError
from glora_llm.evaluation.scoring import passes_of, score_model
from glora_llm.evaluation.trained import load_adapted
from glora_llm.glora.path import LayerPath
from glora_llm.glora.supernet import set_paths
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.search_scorer import RowScorer
from glora_llm.schema import SearchSection
from glora_llm.search.archive import Journal
from glora_llm.search.limits import limits
from glora_llm.search.space import Code, Space, space_of
from glora_llm.search.surrogate import Observations, Surrogate

FINALISTS = 12


def main() -> int:
    """Compare, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    arguments = parser.parse_args()
    quiet_libraries()
    print("| run | path | parameters | validation loss | test loss | test exact match |\n|---|---|---|---|---|---|")
    found: dict[str, list[float]] = {}
    for run in arguments.runs:
        for name, cells, exact in compare(run):
            print(f"| {run.name} | {name} | " + " | ".join(cells) + f" | {exact:.3f} |", flush=True)
            found.setdefault(name.partition(" (")[0], []).append(exact)
    for name, values in found.items():
        spread = f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        print(f"\n{name}: test exact match {spread}, {len(values)} runs")
    return 0


def compare(run: Path) -> list[tuple[str, list[str], float]]:
    """Return (name, cells, test exact match) of the genome and of the best uniform path of one run."""
    folder = RunFolder(run)
    plan = make_plan(folder.recipe())
    model = load_adapted(plan, folder.adapter)
    layers = adapted_layers(model)
    settings = plan.recipe.search or SearchSection()
    space = space_of(layers, settings)
    limit = next(iter(limits(settings).values()))
    loss = settings.model_copy(update={"metric": "loss"})
    scorer = RowScorer.of(plan, layers, loss, passes_of(plan, model), lambda table: table)
    rows = np.arange(len(scorer.numbers))
    surrogate = _fit_surrogate(space, Journal.read(folder.search / "journal.jsonl"), len(rows))
    uniform = sorted(space.uniforms(limit), key=surrogate.predict, reverse=True)[:FINALISTS]
    if not uniform:
        raise UserError("No single path for all layers is within the limit of this search.")
    scores = {c.tobytes(): float(scorer([(space.genome(c), rows)])[0].mean()) for c in tqdm(uniform, desc="uniform")}
    best = max(uniform, key=lambda code: scores[code.tobytes()])
    chosen = space.code(read_genome(folder.genome))
    text = ", ".join(f"{slot} {spec.mode} {spec.rank or ''}".strip() for slot, spec in _first(space, best).active())
    result = []
    for name, code in (("genome of the search", chosen), (f"best uniform path ({text})", best)):
        score = float(scorer([(space.genome(code), rows)])[0].mean())
        set_paths(layers, space.genome(code))
        test = score_model(plan, model, "test")
        cells = [f"{space.size(code):,}", f"{-score:.4f}", f"{test['test/loss']:.4f}"]
        result.append((name, cells, test["test/exact_match"]))
    return result


def _fit_surrogate(space: Space, lines: list[str], rows: int) -> Surrogate:
    """Fit a surrogate model to a journal, each row's own difficulty taken out."""
    journal = Journal(None, json.loads(lines[0]), rows, lines)
    table = np.array(list(journal.values.values()))
    table -= np.nanmean(table, 0)
    slopes = journal.mean_slopes()
    observations = Observations(space, None if slopes is None else space.table(slopes))
    for key, values in zip(journal.values, table, strict=True):
        observations.add(np.frombuffer(key, np.uint8), 0, float(np.nanmean(values)))
    return observations.fit()


def _first(space: Space, code: Code) -> LayerPath:
    return next(iter(space.genome(code).values()))


if __name__ == "__main__":
    raise SystemExit(main())
