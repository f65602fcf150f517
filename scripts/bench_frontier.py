"""Score against trained parameters: LoRA, GLoRA in even scaling, and structures chosen by each predictor.

  GLORA_DATA=FOLDER python scripts/bench_frontier.py [--tasks sst2 rte banking77] [--seeds 1] [--jobs 2]
      [--budgets 1.22M 0.305M 0.1M 0.05M] [--methods lora glora:uniform glora:agreement]
      [--rates 1e-3 2.5e-3 6e-3] [--slots "{B: lora}"] [--steps 24] [--dtype bfloat16] [--figure frontier.svg]
      [--list] [--table-only]

A thin layer over `glora-llm compare`: one comparison for each task and budget, in OUT/TASK-BUDGET, in which each
method's rate is chosen on validation rows, the worse half of the rates is stopped after a third, and the test rows are
read once for each seed at the best rate. Below one rank of LoRA everywhere, LoRA takes part on several choices of
targets (lora@q_proj+up_proj); the best of them on validation rows is LoRA there. --methods may also name glora:energy,
glora:short_run, and whatever else `compare` knows.
FOLDER holds sst2/ and rte/ as train.parquet and validation.parquet; banking77 needs none.

Finished runs are not made again, so the command may be stopped and started, and started again with more --seeds, as
long as steps and dtype stay. Prints a Markdown table for each task; --figure draws them; --table-only trains nothing.

Cost, of the 20 to 40 s of a core that a run of SST-2 takes (24 steps of 8, AMD EPYC): a method with three rates is two
and a third runs and a final one, 2 core-minutes, and half a minute more for each further seed; gradients of 64 samples
and the base that is loaded for them add about half a minute to each run of a predictor but uniform. Four budgets with
the five default methods and LoRA's five choices of targets: 1 core-hour on one seed, 1.4 on three. RTE's samples are
three times as long: 2.5 and 3.5. Banking77 (75 steps of 16): about ten times SST-2.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

SHORT = ["training.global_batch=8", "evaluation.every=8", "data.validation=200", "data.max_test_rows=400"]
# name -> steps, recipe, score, overrides. The first two in few and short steps, as docs/benchmarks/methods.md.
TASKS: dict[str, tuple[int, str, str, list[str]]] = {
    "sst2": (24, "smollm2_glue", "accuracy", ["data.source={data}/sst2", *SHORT]),
    "rte": (24, "smollm2_glue", "accuracy", ["data.benchmark=rte", "data.source={data}/rte", *SHORT]),
    "banking77": (75, "smollm2_glora", "exact_match", []),
}
BUDGETS = ["1.22M", "0.305M", "0.1M", "0.05M"]
METHODS = ["lora", "glora:uniform", "glora:first_step", "glora:curvature", "glora:agreement"]
RATES = ["1e-3", "2.5e-3", "6e-3"]
# Targets of LoRA of rank 1 within a budget below rank 1 everywhere, on SmolLM2-135M: 97,920, 80,640 and 97,920
# parameters, and 46,080 and 34,560.
TARGETS = {
    "0.1M": ["down_proj+o_proj", "q_proj+k_proj+v_proj", "q_proj+up_proj"],
    "0.05M": ["k_proj+v_proj", "o_proj"],
}
NEEDS_ALL = ("lora", "glora:even")  # that have no rank below one everywhere
LARGEST_RANK = 16  # that a structure may give to a slot


class Comparison(NamedTuple):
    """One run of `glora-llm compare`.

    Args:
        folder: of the comparison.
        task, budget: what it is of.
        methods: that take part.
    """

    folder: Path
    task: str
    budget: str
    methods: list[str]


def main() -> int:
    """Run the comparisons, then print what they say."""
    arguments = parse()
    comparisons = planned(arguments)
    if arguments.list:
        print("\n".join(" ".join(command(one, arguments)) for one in comparisons))
        return 0
    codes = []
    if not arguments.table_only:
        if (
            any("{data}" in text for task in arguments.tasks for text in TASKS[task][3])
            and "GLORA_DATA" not in os.environ
        ):
            print("error: GLORA_DATA must name the folder that holds sst2/ and rte/", file=sys.stderr)
            return 2
        for one in comparisons:
            codes.append(subprocess.run(command(one, arguments), check=False).returncode)
            if codes[-1] == STOPPED:
                print("stopped; the same command goes on", file=sys.stderr)
                return STOPPED
    found = {task: points(comparisons, task) for task in arguments.tasks}
    for task, rows in found.items():
        print(table(task, rows))
    if arguments.figure is not None:
        draw(found).savefig(arguments.figure)
        print(f"{arguments.figure} written")
    return int(any(codes))


STOPPED = 75  # exit code of a comparison that was told to stop


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_frontier"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["sst2"])
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="(default: %(default)s)")
    parser.add_argument("--rates", nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=1, help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="(default: those of the task)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--slots", default="null", help="that structures choose from; needs an own --out")
    parser.add_argument("--jobs", type=int, help="trials at once (default: one a core)")
    parser.add_argument("--forgetting", help="a text, as of `glora-llm compare` (default: the shipped one)")
    parser.add_argument("--figure", type=Path, help="draw score against parameters: .svg, .png or .pdf")
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    return parser.parse_args()


def planned(arguments: argparse.Namespace) -> list[Comparison]:
    """Return the comparisons, large budgets first."""
    found = []
    for task in arguments.tasks:
        for budget in arguments.budgets:
            small = budget in TARGETS
            methods = [name for name in arguments.methods if not (small and name in NEEDS_ALL)]
            methods += [f"lora@{targets}" for targets in TARGETS.get(budget, []) if "lora" in arguments.methods]
            found += [Comparison(arguments.out / f"{task}-{budget}", task, budget, methods)] if methods else []
    return found


def command(one: Comparison, arguments: argparse.Namespace) -> list[str]:
    """Return the command of one comparison."""
    steps, recipe, score, changes = TASKS[one.task]
    words = [sys.executable, "-m", "glora_llm", "compare", "--recipe", recipe, "--methods", ",".join(one.methods)]
    words += ["--budget", one.budget, "--seeds", str(arguments.seeds), "--rates", ",".join(arguments.rates)]
    words += ["--score", score, "--out", str(one.folder)]
    words += ["--nearest"] if one.budget in TARGETS else []  # rank 1 of some targets may be well below the budget
    words += ["--jobs", str(arguments.jobs)] if arguments.jobs else []
    words += ["--forgetting", arguments.forgetting] if arguments.forgetting else []
    data = os.environ.get("GLORA_DATA", "GLORA_DATA")
    words += [text.replace("{data}", data) for text in changes]
    words += [f"training.steps={arguments.steps or steps}", f"model.dtype={arguments.dtype}"]
    words += [f"adapter.slots={arguments.slots}", "adapter.scaling=even"]  # even: one alpha for all methods and ranks
    return [*words, f"adapter.rank={LARGEST_RANK}", f"adapter.alpha={LARGEST_RANK}"]


def points(comparisons: list[Comparison], task: str) -> list[dict[str, Any]]:
    """Return a row for each method and budget of a task: name, budget, and the row of the comparison."""
    found: list[dict[str, Any]] = []
    for one in comparisons:
        file = one.folder / "comparison.json"
        if one.task != task or not file.is_file():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        for row in content.get("methods", []):
            found.append(row | {"budget": one.budget, "higher": content["higher"]})
    chosen = [row for row in found if row["name"].startswith("lora@")]
    best = [best_targets([row for row in chosen if row["budget"] == budget]) for budget in TARGETS]
    return [row for row in found if row not in chosen] + [row for row in best if row is not None]


def best_targets(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the LoRA whose targets validate best at its best rate: no test row chooses them."""
    ended = [row for row in rows if row.get("rates")]
    if not ended:
        return None
    pick = max if ended[0]["higher"] else min
    row = pick(ended, key=lambda one: pick(one["rates"].values()))
    return row | {"name": row["name"].replace("@", " on ").replace("+", ", ")}


def table(task: str, rows: list[dict[str, Any]]) -> str:
    """Return the rows of a task as Markdown."""
    lines = [
        f"\n{task}\n",
        "| budget | method | parameters | best rate | test score (range) | to LoRA (p) | to its loss | forgetting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda one: -(one["parameters"] or 0)):
        lora = next((o for o in rows if o["budget"] == row["budget"] and o["name"].startswith("lora")), None)
        lines.append("| " + " | ".join([row["budget"], row["name"], *cells(row, lora, TASKS[task][2])]) + " |")
    return "\n".join(lines)


def cells(row: dict[str, Any], lora: dict[str, Any] | None, score: str) -> list[str]:
    """Return the cells of one method, the last ones against LoRA, on its own targets or on chosen ones."""
    if row.get("mean") is None:
        return [str(row["parameters"] or "-"), "-", row.get("why") or row["verdict"], "-", "-", "-"]
    rival = None if lora is None or lora is row or lora.get("mean") is None else lora
    gap = "-" if rival is None else f"{row['mean'] - rival['mean']:+.3f} ({p_value(row, rival, score)})"
    reached = row["steps"] if lora is row else steps_to(row, rival) if rival else None
    rate = f"{row['lr']:g}{' (edge)' if row['lr_at_edge'] else ''}"
    found = f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f}, {len(row['scores'])})"
    forgotten = "-" if row["forgetting"] is None else f"{row['forgetting']:+.3f}"
    return [f"{row['parameters']:,}", rate, found, gap, "-" if reached is None else f"{reached:g}", forgotten]


def p_value(row: dict[str, Any], lora: dict[str, Any], score: str) -> str:
    """Return the p-value of a test of a method against LoRA, paired over test rows, else over seeds."""
    from glora_llm.compare.significance import over_rows, over_seeds, row_scores

    both = [[row_scores(Path(p), score, s) for p, s in zip(o["trials"], o["scores"], strict=True)] for o in (lora, row)]
    first, other = ([one for one in scores if one is not None] for scores in both)
    whole = len(first) == len(other) == len(row["scores"])
    test = (over_rows(first, other) if whole else None) or over_seeds(lora["scores"], row["scores"])
    return "not tested" if test.p_value is None else f"p {test.p_value:.2g}"


def steps_to(row: dict[str, Any], lora: dict[str, Any]) -> float | None:
    """Return the mean steps until the validation loss is at most LoRA's at its end; None: a seed never gets there.

    With those that as many samples make as the structure was chosen by.
    """
    from glora_llm.compare.table import steps_until
    from glora_llm.compare.trial import Result

    found = []
    for mine, its in zip(row["trials"], lora["trials"], strict=True):
        ends = list(Result.of(Path(its)).validations("loss").values())[-1:]
        found.append(steps_until(Result.of(Path(mine)), ends[0]) if ends else None)
    there = [steps for steps in found if steps is not None]
    return sum(there) / len(there) if there and len(there) == len(found) else None


def draw(found: dict[str, list[dict[str, Any]]]) -> Any:
    """Draw score against parameters, a panel for each task and a line for each method."""
    from glora_llm.report.drawing import BLUE, GREY, ORANGE, VERMILLION, empty_figure, tidy

    colours = [GREY, BLUE, VERMILLION, ORANGE, "#009E73", "#CC79A7"]
    figure = empty_figure((4.6 * len(found), 4.2))
    for axes, (task, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        scored = [row for row in rows if row.get("mean") is not None]
        names = sorted({row["name"].partition(" on ")[0] for row in scored})
        for number, name in enumerate(names):
            line = sorted((r for r in scored if r["name"].partition(" on ")[0] == name), key=lambda r: r["parameters"])
            x, y = [row["parameters"] for row in line], [row["mean"] for row in line]
            reach = [[row["mean"] - row["low"] for row in line], [row["high"] - row["mean"] for row in line]]
            colour = colours[number % len(colours)]
            axes.errorbar(x, y, yerr=reach, fmt="o-", color=colour, capsize=3, markersize=4, linewidth=1.2, label=name)
        axes.set_xscale("log")
        axes.set_xlabel("Trained parameters")
        axes.set_ylabel(f"Test score, {task}")
        tidy(axes, "both")
        if names:
            axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
