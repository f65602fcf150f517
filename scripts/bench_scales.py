"""The best learning rate of every slot alone, and of every rank: what the constants of even scaling are set by.

  GLORA_DATA=FOLDER python scripts/bench_scales.py slots|ranks|auto [--rates 5e-4 2e-3 8e-3 3.2e-2] [--refine]
      [--seeds 0] [--jobs 2] [--steps 24] [--forms "A lora" "B lora"] [--task sst2|banking77] [--table-only]

slots  each slot and mode alone in even scaling, rank 8, alpha 16. Where all best rates are that of `B lora`, one rate
       fits all; else its constant (adapters/even.py: CONSTANTS) is to be multiplied by its best rate over that of B.
ranks  LoRA and even GLoRA (A, B, C, E) of rank 1, 4, 16 and 64 at alpha 16: RANK_EXPONENT (adapters/auto_rate.py) is 1
       less the slope of log(best rate) over log(rank), and BASE_RATE the level of the best rates.
auto   forms at `training.lr: auto` alone: their losses stand beside the best of the other two tables' runs.
Changed constants make new runs of `auto`, not of the others: give those another --out (a slot alone needs none).

SmolLM2-135M in bfloat16; SST-2, 24 steps of 8 sentences (FOLDER/sst2 holds train.parquet and validation.parquet), or
Banking77, 75 steps of 16 questions, shipped; validation loss on 200 rows that are no test rows, the same for all forms.
Trials are forked, as those of `glora-llm compare`. Finished ones are not made again and stopped ones go on, so the
command may be stopped (Ctrl-C, SIGTERM) and started. --refine adds lower and higher rates to a form until the lowest
and the highest are worse than the best. Prints a Markdown table of the loss by rate; the best rate is the middle, over
log(rate), of those within 0.07 nats of the smallest loss: runs of neighbouring rates differ by half of that by chance.

Cost: 24 steps and the validation of SST-2 take 20 to 40 s of a core (AMD EPYC), so `slots` with four rates and --refine
is 9 x 6 runs, half a core-hour; `ranks` 8 x 6, of rank 64 at about twice the time, 0.6 core-hours; `auto` 17 runs, 0.2.
A run of Banking77 takes about ten times as long.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the script is run by its path

from glora_llm.compare.pool import Ending, Pool  # noqa: E402
from glora_llm.launch.stop import EXIT_CODE  # noqa: E402
from scripts.scales.best_rates import Losses, best_rate, finer  # noqa: E402
from scripts.scales.forked import DIVERGED, train_all  # noqa: E402

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
RATES = ["5e-4", "2e-3", "8e-3", "3.2e-2"]
TASKS: dict[str, tuple[int, list[str]]] = {  # steps, recipe and settings
    "sst2": (24, ["smollm2_glue", "data.source={data}/sst2", "training.global_batch=8"]),
    "banking77": (75, ["smollm2_glora"]),
}
Run = tuple[Path, list[str]]  # the folder of a run, and the arguments of `glora-llm` that train it


def main() -> int:
    """Train what is missing, then print the table."""
    arguments = parse()
    forms = TABLES[arguments.table]
    if arguments.task == "sst2" and "GLORA_DATA" not in os.environ and not arguments.table_only:
        print("error: GLORA_DATA must name the folder that holds sst2/; or --task banking77", file=sys.stderr)
        return 2
    chosen = {name: section for name, section in forms.items() if name in (arguments.forms or forms)}
    rates = ["auto"] if arguments.table == "auto" else arguments.rates
    out = arguments.out / f"{arguments.task}-{arguments.steps}-steps-{arguments.dtype}"
    found = partial(losses, out, seeds=arguments.seeds)
    failed: list[Path] = []
    if not arguments.table_only:
        try:
            failed = train(arguments, out, chosen, dict.fromkeys(chosen, rates))
            for _ in range(2 if arguments.refine and arguments.table != "auto" else 0):
                failed += train(arguments, out, chosen, {form: finer(found(form)) for form in chosen})
        except (KeyboardInterrupt, Ending):
            print("stopped; the same command goes on", file=sys.stderr)
            return EXIT_CODE
    seen = {form: found(form) for form in chosen}
    print(table(seen))
    if arguments.table == "auto":
        print(auto_table({form: auto_loss(out, form, arguments.seeds) for form in chosen}, seen))
    elif arguments.table == "slots":
        print(constants(seen))
    else:
        print(exponents(seen))
    return int(bool(failed))


def train(arguments: argparse.Namespace, out: Path, forms: dict[str, str], rates: dict[str, list[str]]) -> list[Path]:
    """Train what has not ended of some rates of each form; return the folders of runs that failed.

    Raises:
        KeyboardInterrupt, Ending: told to end; the runs have written a checkpoint.
    """
    runs: list[Run] = [
        (folder(out, form, rate, seed), command(arguments, section, rate, seed))
        for seed in arguments.seeds
        for form, section in forms.items()
        for rate in rates[form]
    ]
    waiting = [run for run in runs if loss_of(run[0]) is None]
    train_all(train_one, waiting, arguments.jobs)
    return [run for run, _ in waiting if loss_of(run) is None]


def train_one(pool: Pool, run: Run) -> None:
    """Train one run, whose output lies beside its folder."""
    place, words = run
    log = place.parent / f"{place.name}.log"
    code, seconds = pool.run([*words, f"output.dir={place}"], place, log, lambda: None)
    print(f"{time.strftime('%H:%M:%S')} {place.name}: {cell(loss_of(place))}, {seconds:.0f} s", flush=True)
    if code and loss_of(place) is None:
        print(f"{place} failed with exit code {code}: see {log}", file=sys.stderr)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--out", type=Path, default=Path("runs/bench_scales"))
    parser.add_argument("--rates", nargs="+", default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="(default: those of the task)")
    parser.add_argument("--refine", action="store_true", help="add rates around the best one of each form")
    parser.add_argument("--forms", nargs="+", choices=[*SLOTS, *RANKS], metavar="FORM", help="(default: all)")
    parser.add_argument("--task", choices=list(TASKS), default="sst2")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="trials at once (default: one a core)")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="section.key=value", help="for all runs")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or TASKS[arguments.task][0]
    return arguments


def folder(out: Path, form: str, rate: str, seed: int) -> Path:
    """Return the folder of a run; a rate is written in one way however it was typed, `auto` with what it is made of."""
    text = f"auto{settled()}" if rate == "auto" else f"{float(rate):g}"
    return out / f"{form.replace(' ', '_')}-lr{text}-seed{seed}"


@cache
def settled() -> str:
    """Return a digest of the constants that `auto` and even scaling are made of."""
    from glora_llm.adapters import auto_rate, even

    rates = (auto_rate.BASE_RATE, auto_rate.RANK_EXPONENT, auto_rate.WIDTH_EXPONENT)
    return hashlib.sha256(repr((sorted(even.CONSTANTS.items()), rates)).encode()).hexdigest()[:6]


def command(arguments: argparse.Namespace, section: str, rate: str, seed: int) -> list[str]:
    """Return the arguments of `glora-llm` for one run, without its folder."""
    recipe, *more = TASKS[arguments.task][1]
    own = [f"adapter={section}", f"training.lr={rate}", f"training.seed={seed}", f"training.steps={arguments.steps}"]
    own += ["data.validation=200", "evaluation.every=null", "evaluation.test=false", "merge.after_training=false"]
    own += [f"model.dtype={arguments.dtype}", "output.save_every=1000", "output.keep=1", "training.max_bad_steps=3"]
    given = [text.replace("{data}", os.environ.get("GLORA_DATA", "GLORA_DATA")) for text in more]
    return ["train", "--recipe", recipe, *given, *own, *arguments.overrides]


def losses(out: Path, form: str, seeds: list[int]) -> Losses:
    """Return the mean validation loss over the seeds that have ended, by rate; of a diverged run it is infinite."""
    found: dict[float, list[float]] = {}
    for seed in seeds:
        for run in sorted(out.glob(f"{form.replace(' ', '_')}-lr*-seed{seed}/")):
            rate = run.name.partition("-lr")[2].rpartition("-seed")[0]
            loss = None if rate.startswith("auto") else loss_of(run)
            if loss is not None:
                found.setdefault(float(rate), []).append(loss)
    return {rate: sum(values) / len(values) for rate, values in sorted(found.items())}


def loss_of(run: Path) -> float | None:
    """Return the validation loss of a run; infinite: it diverged; None: it has not ended."""
    file = run / "summary.json"
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if summary.get("validation"):
        loss = summary["validation"].get("validation/loss")
        return math.inf if loss is None or not math.isfinite(loss) else float(loss)
    log = run.parent / f"{run.name}.log"
    said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return math.inf if DIVERGED in said else None


def table(found: dict[str, Losses]) -> str:
    """Return the losses by form and rate, and each form's best rate."""
    rates = sorted({rate for values in found.values() for rate in values})
    head = " | ".join(f"{rate:g}" for rate in rates)
    lines = [f"| form | {head} | best rate |", "|---" * (len(rates) + 2) + "|"]
    for form, values in found.items():
        cells = [cell(values.get(rate)) for rate in rates]
        rate, is_open = best_rate(values)
        best = "-" if math.isnan(rate) else f"{rate:.2g}{' (open)' if is_open else ''}"
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
