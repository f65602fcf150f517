"""The additive search against the GLoRA paper's evolution on one supernet: forward samples, seconds, best score.

  python scripts/bench_search.py [--run RUN] [--budget 15k] [--seeds 0 1 2 3 4] [--out FILE.md]

Without --run a supernet of a small random LLaMA is trained first (`--recipe bench_search`). Evolution runs with its
reference numbers: 50 random candidates, then 20 generations of 50, each scored on all validation rows. A search has
reached the reference when its best candidate is within one standard error of the reference's best: the standard error
of the paired difference over the validation rows. Every search starts with an empty journal. Exits with 1 when the
median of the samples to get there is above a tenth of the reference's.
"""

import argparse
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from glora_llm.adapters.inject import adapted_layers
from glora_llm.evaluation.scoring import passes_of
from glora_llm.evaluation.trained import load_adapted
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.search_scorer import RowScorer
from glora_llm.schema import SearchSection
from glora_llm.search.archive import Journal
from glora_llm.search.driver import Found, search
from glora_llm.search.limits import limits
from glora_llm.search.space import Space, space_of

REFERENCE, OURS, BOUND = "evolution", "additive", 0.1


def main() -> int:
    """Run every search, print the table, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, help="a trained supernet; none: train the small one")
    parser.add_argument(
        "--budget",
        default="15k",
        help="limit on trainable parameters (default: half of what the supernet draws on average)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", type=int, help="validation rows; none: all")
    parser.add_argument("--strategies", nargs="+", default=[REFERENCE, "random", OURS])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    quiet_libraries()
    run = arguments.run or _train(Path("runs/bench_search"))
    bench = Bench(run, arguments.budget, arguments.rows)
    results = {
        name: [bench.search(name, seed) for seed in arguments.seeds] for name in dict.fromkeys(arguments.strategies)
    }
    lines, good = table(results, len(bench.scorer.numbers))
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(not good)


def _train(run: Path) -> Path:
    command = [sys.executable, "train.py", "--recipe", "bench_search", f"output.dir={run}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run


class Bench:
    """One supernet, searched again and again."""

    def __init__(self, run: Path, budget: str, rows: int | None):
        folder = RunFolder(run)
        plan = make_plan(folder.recipe())
        model = load_adapted(plan, folder.adapter)
        layers = adapted_layers(model)
        self.settings = SearchSection(budget=budget, max_rows=rows)
        self.space: Space = space_of(layers, self.settings)
        self.scorer = RowScorer.of(plan, layers, self.settings, passes_of(plan, model), lambda table: table)

    def search(self, strategy: str, seed: int) -> tuple[Found, Any]:
        """Search from nothing; return what was found and the best candidate's scores, (rows)."""
        settings = self.settings.model_copy(update={"strategy": strategy, "seed": seed})
        journal = Journal(None, {}, len(self.scorer.numbers))
        (limit,) = limits(settings).values()
        found = search(self.space, settings, limit, self.scorer, journal)
        print(
            f"{strategy}, seed {seed}: {found.best.score:.4f}, {found.samples} rows, {found.seconds:.0f} s", flush=True
        )
        return found, journal.get(found.best.code, np.arange(len(self.scorer.numbers)))


def reached(found: Found, target: float) -> float:
    """Return the forward samples after which a candidate of that score was known; infinite where there is none."""
    return next((progress.samples for progress in found.history if progress.best >= target), math.inf)


def table(results: dict[str, list[tuple[Found, Any]]], rows: int) -> tuple[list[str], bool]:
    """Return the lines of a Markdown table, and whether the bound is kept."""
    lines = [
        "| strategy | score (minus loss): median (range) | row scores | seconds: median | "
        "row scores to the reference's best less one standard error: median (range) | of the reference's |",
        "|---|---|---|---|---|---|",
    ]
    good = False
    for name, runs in results.items():
        scores = [found.best.score for found, _ in runs]
        shares, needed = [], []
        for (found, values), (reference, best_rows) in zip(runs, results[REFERENCE], strict=True):
            error = _paired_error(values, best_rows)
            needed.append(reached(found, reference.best.score - error))
            shares.append(needed[-1] / reference.samples)
        share = statistics.median(shares)
        good |= name == OURS and share <= BOUND
        cells = [
            f"{statistics.median(scores):.4f} ({min(scores):.4f} to {max(scores):.4f})",
            f"{statistics.median(found.samples for found, _ in runs):,.0f}",
            f"{statistics.median(found.seconds for found, _ in runs):.0f}",
            f"{statistics.median(needed):,.0f} ({min(needed):,.0f} to {max(needed):,.0f})",
            f"{share:.3f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    verdict = "kept" if good else "NOT KEPT"
    lines.append(f"\n{verdict}: {OURS} needs at most {BOUND} of the reference's row scores ({rows} validation rows)")
    return lines, good


def _paired_error(values: Any, reference: Any) -> float:
    return float((values - reference).std(ddof=1) / math.sqrt(len(values)))


if __name__ == "__main__":
    raise SystemExit(main())
