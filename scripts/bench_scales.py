"""The best learning rate of every slot alone, and of every rank: what the constants of even scaling are set by.

  python scripts/bench_scales.py slots|ranks|auto [--rates 1e-3 3e-3 1e-2 3e-2] [--seeds 0] [--jobs 2]
      [--steps 50] [--forms "A lora" "B lora"] [--task banking77] [--table-only]

slots  each slot and mode alone in even scaling, rank 8, alpha 16. Where all best rates are that of `B lora`, one rate
       fits all; else its constant (adapters/even.py: CONSTANTS) is to be multiplied by its best rate over that of B.
ranks  LoRA and even GLoRA (A, B, C, E) of rank 1, 4, 16 and 64 at alpha 16: RANK_EXPONENT (adapters/auto_rate.py) is 1
       less the slope of log(best rate) over log(rank), and BASE_RATE the level of the best rates.
auto   forms at `training.lr: auto` alone: their losses stand beside the best of the other two tables' runs.

SmolLM2-135M in bfloat16, 16 Banking77 questions a step, validation loss on 200 questions; no test row is read. Each run
is `train.py` in a process and on a thread of its own; finished runs are not made again and stopped ones go on, so the
command may be stopped (Ctrl-C, SIGTERM) and started. Prints a Markdown table of the loss by rate; the best rate is the
minimum of the parabola through the three best-placed points over log(rate), or the edge, marked so.

Cost, calculated from 4 s a step on one core of an AMD EPYC (75 steps of the recipe take 5 minutes there in float32),
not measured: 50 steps and one validation are about 4 core-minutes; `slots` 9 forms x 6 rates = 3.6 core-hours, `ranks`
8 forms x 6 rates = 3.2 core-hours, `auto` 17 runs = 1.1 core-hours. Coarser first: --rates 1e-3 4e-3 1.6e-2.
"""

import argparse
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # scripts/vlora_forms is no part of the package

from scripts.vlora_forms.runs import Run, finished, run_all  # noqa: E402

EVEN = "method: glora, targets: all-linear, scaling: even, alpha: 16"
SLOTS = {
    "B lora": f"{{{EVEN}, rank: 8, slots: {{B: lora}}}}",
    "A lora": f"{{{EVEN}, rank: 8, slots: {{A: lora}}}}",
    "A hadamard": f"{{{EVEN}, rank: 8, slots: {{A: lora}}, composition: hadamard}}",
    "A vector": f"{{{EVEN}, slots: {{A: vector}}}}",
    "A block": f"{{{EVEN}, rank: 8, slots: {{A: block}}}}",
    "B vector": f"{{{EVEN}, slots: {{B: vector}}}}",
    "C vector": f"{{{EVEN}, slots: {{C: vector}}}}",
    "E vector": f"{{{EVEN}, slots: {{E: vector}}}}",
    "A B C E": f"{{{EVEN}, rank: 8, slots: {{A: lora, B: lora, C: vector, E: vector}}}}",
}
RANKS = {
    **{f"LoRA {r}": f"{{method: lora, targets: all-linear, rank: {r}, alpha: 16}}" for r in (1, 4, 16, 64)},
    **{f"A B C E {r}": SLOTS["A B C E"].replace("rank: 8", f"rank: {r}") for r in (1, 4, 16, 64)},
}
TABLES = {"slots": SLOTS, "ranks": RANKS, "auto": SLOTS | RANKS}
RATES = ["5e-4", "1e-3", "2e-3", "5e-3", "1e-2", "2e-2"]
TASKS = {
    "banking77": ["smollm2_glora"],
    "sst2": ["smollm2_glue"],  # data.source=FOLDER by --overrides where the hub is out of reach
}
DIVERGED = "had a loss or gradient that is not finite"  # what a run says that ends so
Losses = dict[float, float]  # rate -> validation loss, nats a target; infinite where the run diverged


def main() -> int:
    """Train what is missing, then print the table."""
    arguments = parse()
    forms = TABLES[arguments.table]
    unknown = [form for form in arguments.forms or () if form not in forms]
    if unknown:
        print(f"error: --forms {unknown[0]} is none of {', '.join(forms)}", file=sys.stderr)
        return 2
    chosen = {name: forms[name] for name in arguments.forms or forms}
    rates = ["auto"] if arguments.table == "auto" else arguments.rates
    out = arguments.out / f"{arguments.task}-{arguments.steps}-steps-{arguments.dtype}"
    failed: list[Path] = []
    if not arguments.table_only:
        runs: list[Run] = [  # one rate of all forms first: a stopped command leaves whole columns
            (folder(out, form, rate, seed), command(arguments, section, rate, seed))
            for seed in arguments.seeds
            for rate in rates
            for form, section in chosen.items()
        ]
        try:
            failed = run_all([run for run in runs if loss_of(run[0]) is None], arguments.jobs)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 75
    found = {form: losses(out, form, arguments.seeds) for form in chosen}
    print(table(found))
    if arguments.table == "auto":
        print(auto_table({form: auto_loss(out, form, arguments.seeds) for form in chosen}, found))
    elif arguments.table == "slots":
        print(constants(found))
    else:
        print(exponents(found))
    return int(any(loss_of(run) is None for run in failed))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--out", type=Path, default=Path("runs/bench_scales"))
    parser.add_argument("--rates", nargs="+", default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--forms", nargs="+", metavar="FORM", help="(default: all of the table)")
    parser.add_argument("--task", choices=list(TASKS), default="banking77")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: %(default)s)")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="section.key=value", help="for all runs")
    return parser.parse_args()


def folder(out: Path, form: str, rate: str, seed: int) -> Path:
    """Return the folder of a run; a rate is written in one way however it was typed."""
    text = rate if rate == "auto" else f"{float(rate):g}"
    return out / f"{form.replace(' ', '_')}-lr{text}-seed{seed}"


def command(arguments: argparse.Namespace, section: str, rate: str, seed: int) -> list[str]:
    """Return the command of one run, without its folder."""
    recipe, *more = TASKS[arguments.task]
    own = [f"adapter={section}", f"training.lr={rate}", f"training.seed={seed}", f"training.steps={arguments.steps}"]
    kept = ["data.test=null", "data.max_test_rows=null", "merge.after_training=false", "output.save_every=1000"]
    own += [f"model.dtype={arguments.dtype}", "evaluation.test=false", "training.max_bad_steps=3", *kept]
    return [sys.executable, "train.py", "--recipe", recipe, *more, *own, *arguments.overrides]


def losses(out: Path, form: str, seeds: list[int]) -> Losses:
    """Return the mean validation loss over the seeds that have ended, by rate; of a diverged run it is infinite."""
    found: dict[float, list[float]] = {}
    for seed in seeds:
        for run in sorted(out.glob(f"{form.replace(' ', '_')}-lr*-seed{seed}/")):
            rate = run.name.partition("-lr")[2].rpartition("-seed")[0]
            loss = None if rate == "auto" else loss_of(run)
            if loss is not None:
                found.setdefault(float(rate), []).append(loss)
    return {rate: sum(values) / len(values) for rate, values in sorted(found.items())}


def loss_of(run: Path) -> float | None:
    """Return the validation loss of a run; infinite: it diverged; None: it has not ended."""
    summary = finished(run)
    if summary is not None:
        loss = summary.get("validation", {}).get("validation/loss")
        return math.inf if loss is None or not math.isfinite(loss) else float(loss)
    log = run.parent / f"{run.name}.log"
    said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return math.inf if DIVERGED in said else None


def best_rate(found: Losses) -> tuple[float, bool]:
    """Return the rate of the smallest loss, by a parabola over log(rate), and whether it is at an edge of the rates."""
    rates = [rate for rate, loss in found.items() if math.isfinite(loss)]
    if not rates:
        return math.nan, True
    place = min(range(len(rates)), key=lambda index: found[rates[index]])
    if place in (0, len(rates) - 1):
        return rates[place], place == 0 or math.isfinite(list(found.values())[-1])
    x = [math.log(rates[place + step]) for step in (-1, 0, 1)]
    y = [found[rates[place + step]] for step in (-1, 0, 1)]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curve = (right - left) / (x[2] - x[0])
    vertex = (x[0] + x[1]) / 2 - left / (2 * curve) if curve > 0 else x[1]
    return math.exp(min(max(vertex, x[0]), x[2])), False


def table(found: dict[str, Losses]) -> str:
    """Return the losses by form and rate, and each form's best rate."""
    rates = sorted({rate for values in found.values() for rate in values})
    lines = [
        "| form | " + " | ".join(f"{rate:g}" for rate in rates) + " | best rate |",
        "|---" * (len(rates) + 2) + "|",
    ]
    for form, values in found.items():
        cells = [cell(values.get(rate)) for rate in rates]
        rate, is_edge = best_rate(values)
        best = "-" if math.isnan(rate) else f"{rate:.2g}{' (edge)' if is_edge else ''}"
        lines.append(f"| {form} | " + " | ".join(cells) + f" | {best} |")
    return "\n".join(lines)


def cell(loss: float | None) -> str:
    """Return a loss as text."""
    if loss is None:
        return "-"
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def constants(found: dict[str, Losses]) -> str:
    """Return what CONSTANTS are to be multiplied by: the best rate of each slot over that of B."""
    reference = best_rate(found.get("B lora", {}))[0]
    lines = ["", "| slot | CONSTANTS times (best rate over that of B lora) |", "|---|---|"]
    lines += [f"| {form} | {best_rate(values)[0] / reference:.3g} |" for form, values in found.items()]
    return "\n".join(lines)


def exponents(found: dict[str, Losses]) -> str:
    """Return, of each family of forms, the slope of log(best rate) over log(rank)."""
    families: dict[str, list[tuple[float, float]]] = {}
    for form, values in found.items():
        name, _, rank = form.rpartition(" ")
        rate = best_rate(values)[0]
        if not math.isnan(rate):
            families.setdefault(name, []).append((math.log(int(rank)), math.log(rate)))
    lines = [""]
    for name, points in families.items():
        if len(points) < 2:
            continue
        x_mean, y_mean = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
        slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
        lines.append(
            f"{name}: best rate as rank ^ {slope:+.2f} at alpha / rank, so RANK_EXPONENT {1 - slope:.2f}; geometric "
            f"mean of the best rates {math.exp(y_mean):.2g}"
        )
    return "\n".join(lines)


def auto_loss(out: Path, form: str, seeds: list[int]) -> tuple[float | None, float | None]:
    """Return the number that `auto` came to, and the mean loss there."""
    runs = [folder(out, form, "auto", seed) for seed in seeds]
    values = [loss for run in runs if (loss := loss_of(run)) is not None]
    file = runs[0] / "learning_rate.json"
    rate = json.loads(file.read_text(encoding="utf-8"))["lr"] if file.is_file() else None
    return rate, sum(values) / len(values) if values else None


def auto_table(at_auto: dict[str, tuple[float | None, float | None]], found: dict[str, Losses]) -> str:
    """Return the loss at the automatic rate beside the best of all rates."""
    lines = ["", "| form | auto | loss there | best loss of all rates | difference |", "|---|---|---|---|---|"]
    for form, (rate, loss) in at_auto.items():
        best = min(found[form].values(), default=None)
        gap = "-" if loss is None or best is None else f"{loss - best:+.3f}"
        lines.append(f"| {form} | {'-' if rate is None else f'{rate:g}'} | {cell(loss)} | {cell(best)} | {gap} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
