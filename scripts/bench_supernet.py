"""A supernet, a search and further training against training LoRA alone for as many steps, at the same rate.

  GLORA_DATA=FOLDER python scripts/bench_supernet.py [--variants plain even even+sandwich] [--rates 2.5e-3] [--seeds 0]
      [--steps 48] [--further 24] [--start 16] [--rank 2] [--passes 10] [--jobs 2] [--list] [--table-only]

Each variant trains a supernet of ranks 8, 4 and 2 on all linears for --steps steps, searches within the parameters of a
LoRA of --rank by validation rows (--passes times over 100 of them), and trains the genome --further steps. `LoRA` is a
LoRA of --rank from the first step on, for all of these steps together. `even+from B` gives the first --start of the
supernet's steps to a LoRA of rank 8, with which slot B begins.

SmolLM2-135M in bfloat16 on SST-2 (FOLDER/sst2 holds train.parquet and validation.parquet), 8 sentences a step in micro
batches of --micro-batch, of which each draws paths. Losses are of 400 test rows, which no search reads: of the largest
path, of the genome with inherited weights, and of the genome trained further. The search's passes are no steps: its
seconds stand beside the others.

Trials are forked, as those of `glora-llm compare`. Finished ones are not made again and stopped ones go on, so the
command may be stopped (Ctrl-C, SIGTERM) and started, with more variants, rates and seeds; other steps, ranks and passes
have other folders. --list prints the commands, --table-only trains nothing.

Cost, of the 20 to 40 s that 24 steps and a validation of bench_scales.py take on a core (AMD EPYC): 72 steps are 1 to 2
minutes, the search about one, the test scores half a minute; `distill` a third more of the supernet. All nine variants
at one rate and seed: about half a core-hour.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the script is run by its path

from glora_llm.compare.pool import Ending, Pool  # noqa: E402
from glora_llm.launch.stop import EXIT_CODE  # noqa: E402
from scripts.scales.forked import DIVERGED, train_all  # noqa: E402

RANKS = (8, 4, 2)
LORA_OF_RANK_1 = 305_280  # parameters on all linears of SmolLM2-135M
LORA, START = "LoRA", "start of B"
TO_B = "odds: {A: {none: 3}, B: {lora: 4}, C: {none: 3}, E: {none: 3}}"
VARIANTS: dict[str, tuple[str, str]] = {  # scaling, options of the supernet
    LORA: ("", ""),
    "plain": ("alpha", ""),
    "plain+sandwich": ("alpha", "sandwich: 4"),
    "plain+from B": ("alpha", ""),
    "even": ("even", ""),
    "even+sandwich": ("even", "sandwich: 4"),
    "even+distill": ("even", "sandwich: 4, distill: 0.5"),
    "even+weighted": ("even", TO_B),
    "even+from B": ("even", ""),
}


class Run(NamedTuple):
    """One trial.

    Args:
        folder: of the run.
        variant: a key of VARIANTS, or START.
        words: the arguments of `glora-llm` that make it, without its folder.
        needs: the run that it begins with.
    """

    folder: Path
    variant: str
    words: list[str]
    needs: Path | None = None


def main() -> int:
    """Train what is missing, then print the table."""
    arguments = parse()
    runs = planned(arguments)
    if arguments.list:
        print("\n".join(shlex.join(["glora-llm", *run.words, f"output.dir={run.folder}"]) for run in runs))
        return 0
    if not arguments.table_only:
        if "GLORA_DATA" not in os.environ and not arguments.overrides:
            print("error: GLORA_DATA must name the folder that holds sst2/", file=sys.stderr)
            return 2
        try:
            for is_later in (False, True):  # starts before those that they are of
                train([run for run in runs if (run.needs is not None) == is_later], arguments.jobs)
        except (KeyboardInterrupt, Ending):
            print("stopped; the same command goes on", file=sys.stderr)
            return EXIT_CODE
    print(table(runs, arguments))
    return int(not arguments.table_only and not all(ended(run) or diverged(run) for run in runs))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_supernet"))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--rates", nargs="+", default=["2.5e-3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=48, help="of the supernet (default: %(default)s)")
    parser.add_argument("--further", type=int, default=24, help="of the genome (default: %(default)s)")
    parser.add_argument("--start", type=int, default=16, help="of --steps, of a LoRA (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=2, help="of the LoRA that is the limit (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=10, help="of the search (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sentences (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="trials at once (default: one a core)")
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="section.key=value", help="for all runs")
    return parser.parse_args()


def planned(arguments: argparse.Namespace) -> list[Run]:
    """Return all trials; a start stands before what begins with it."""
    found: dict[Path, Run] = {}
    for seed in arguments.seeds:
        for rate in arguments.rates:
            for variant in arguments.variants:
                for run in runs_of(variant, rate, seed, arguments):
                    found[run.folder] = run
    return list(found.values())


def runs_of(variant: str, rate: str, seed: int, arguments: argparse.Namespace) -> list[Run]:
    """Return the trials of a variant: itself, behind the start that it may have."""
    total, of_rank = arguments.steps + arguments.further, f"r{arguments.rank}-b{arguments.micro_batch}"

    def make(name: str, steps: int, sizes: str, needs: Path | None, *more: str) -> Run:
        folder = arguments.out / f"{name.replace(' ', '_')}-{sizes}-lr{float(rate):g}-seed{seed}"
        return Run(folder, name, [*common(arguments), f"training.steps={steps}", *settings, *more], needs)

    settings = [f"training.lr={rate}", f"training.seed={seed}"]
    if variant == LORA:
        return [make(LORA, total, f"{total}-{of_rank}", None, lora(arguments.rank), *arguments.overrides)]
    starts: list[Run] = []
    if variant.endswith("from B"):
        starts = [make(START, arguments.start, f"{arguments.start}-b{arguments.micro_batch}", None, lora(RANKS[0]))]
        starts[0].words.extend(arguments.overrides)
    scaling, options = VARIANTS[variant]
    weights = f", weights: {starts[0].folder / 'adapter'}" if starts else ""
    supernet = f"supernet: {{{', '.join(filter(None, [f'ranks: {list(RANKS)}', options]))}}}"
    section = f"adapter={{method: glora, targets: all-linear, paths: sample, alpha: 16, scaling: {scaling}, {supernet}"
    search = f"search={{budget: {arguments.rank * LORA_OF_RANK_1}, passes: {arguments.passes}, max_rows: 100}}"
    steps = arguments.steps - (arguments.start if starts else 0)
    sizes = f"{steps}+{arguments.further}-p{arguments.passes}-{of_rank}"
    sizes = f"{arguments.start}+{sizes}" if starts else sizes
    more = [section + weights + "}", search, f"search.finetune_steps={arguments.further}", *arguments.overrides]
    return [*starts, make(variant, steps, sizes, starts[0].folder if starts else None, *more)]


def lora(rank: int) -> str:
    """Return the adapter of a LoRA."""
    return f"adapter={{method: lora, targets: all-linear, rank: {rank}, alpha: 16}}"


def common(arguments: argparse.Namespace) -> list[str]:
    """Return the arguments of all trials."""
    data = os.environ.get("GLORA_DATA", "GLORA_DATA")
    words = ["train", "--recipe", "smollm2_glue", f"data.source={data}/sst2", "data.validation=200"]
    words += ["data.max_test_rows=400", "model.dtype=bfloat16", "training.global_batch=8", "evaluation.every=null"]
    words += [f"training.micro_batch={arguments.micro_batch}", "merge.after_training=false", "output.save_every=1000"]
    return [*words, "output.keep=1", "training.max_bad_steps=3"]


def train(runs: list[Run], jobs: int | None) -> None:
    """Train what has not ended.

    Raises:
        KeyboardInterrupt, Ending: told to end; the runs have written a checkpoint.
    """
    train_all(train_one, [run for run in runs if not ended(run) and not diverged(run)], jobs)


def train_one(pool: Pool, run: Run) -> None:
    """Train one run, whose output lies beside its folder; what begins with a start that failed is left out."""
    if run.needs is not None and not (run.needs / "adapter").is_dir():
        print(f"{run.folder.name}: {run.needs} has no adapter to begin with", file=sys.stderr)
        return
    code, seconds = pool.run([*run.words, f"output.dir={run.folder}"], run.folder, log_of(run), lambda: None)
    print(f"{time.strftime('%H:%M:%S')} {run.folder.name}: {seconds:.0f} s", flush=True)
    if code and not diverged(run):
        print(f"{run.folder} failed with exit code {code}: see {log_of(run)}", file=sys.stderr)


def log_of(run: Run) -> Path:
    """Return the file that holds what a run says."""
    return run.folder.parent / f"{run.folder.name}.log"


def diverged(run: Run) -> bool:
    """Tell whether a run ended because its loss was not finite."""
    log = log_of(run)
    return log.is_file() and DIVERGED in log.read_text(encoding="utf-8", errors="replace")


def summary_of(folder: Path) -> dict[str, Any]:
    """Return the summary of a run folder; empty where there is none."""
    file = folder / "summary.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def ended(run: Run) -> bool:
    """Tell whether a run has all that the table says of it."""
    return ("test" if run.variant in (LORA, START) else "test_finetuned") in summary_of(run.folder)


def cells_of(run: Run, start: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of an ended run, by column.

    Args:
        start: summary of the run that it begins with.
    """
    first = summary_of(run.folder)
    last = first if run.variant == LORA else summary_of(run.folder / "finetuned")
    scores = last["test"]
    found = {"parameters": last["trained_parameters"], "further": scores["test/loss"]}
    accuracy = next((scores[name] for name in ("test/accuracy", "test/exact_match") if name in scores), None)
    found |= {} if accuracy is None else {"score": accuracy}
    parts, searched = [first, start], 0.0
    if run.variant != LORA:
        searched = sum(one["seconds"] for one in first["search"].values())
        found |= {"largest": first["test"]["test/loss"], "inherited": first["test_genome"]["test/loss"]}
        parts.append(last)
    found["steps"] = sum(part.get("steps", 0) for part in parts)
    return found | {"seconds": sum(part.get("seconds", 0.0) for part in parts) + searched, "search": searched}


def table(runs: list[Run], arguments: argparse.Namespace) -> str:
    """Return a line for each variant and rate, with means over the seeds that have ended."""
    head = ["variant", "rate", "seeds", "parameters", "largest path, loss", "inherited, loss", "trained further, loss"]
    head += ["score", "steps", "seconds (search)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    starts: dict[Path | None, Any] = {run.folder: summary_of(run.folder) for run in runs if run.variant == START}
    for variant in arguments.variants:
        for rate in arguments.rates:
            mine = [run for run in runs if run.variant == variant and f"training.lr={rate}" in run.words]
            found = [cells_of(run, starts.get(run.needs, {})) for run in mine if ended(run)]
            bad = sum(diverged(run) for run in mine if not ended(run))
            told = f"{len(found)}" + (f", {bad} diverged" if bad else "")
            lines.append("| " + " | ".join([variant, f"{float(rate):g}", told, *_means(found)]) + " |")
    return "\n".join(lines)


def _means(found: list[dict[str, float]]) -> list[str]:
    """Return the cells behind the seeds."""
    forms = {"parameters": ",.0f", **dict.fromkeys(["largest", "inherited", "further", "score"], ".3f"), "steps": ".0f"}
    means = {
        name: format(fmean(one[name] for one in found), form)
        for name, form in (forms | {"seconds": ".0f", "search": ".0f"}).items()
        if found and all(name in one for one in found)
    }
    seconds = f"{means['seconds']} ({means['search']})" if found else "-"
    return [*(means.get(name, "-") for name in forms), seconds]


if __name__ == "__main__":
    raise SystemExit(main())
