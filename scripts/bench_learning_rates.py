"""GLoRA with its default learning-rate factors against LoRA at equal parameters: Banking77 on SmolLM2-135M, by rate.

  python scripts/bench_learning_rates.py --out runs/bench_learning_rates [--rates 5e-4 2e-3 5e-3] [--seeds 0 1 2]

Each run is `train.py --recipe smollm2_glora` or `smollm2_lora` in a process of its own; runs that are finished are not
repeated, so the command may be stopped and started. Prints a Markdown table; exits with 1 when GLoRA is below LoRA by
more than a standard error at any rate, or its best is below LoRA's best by more than one.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

METHODS = ("lora", "glora")


def main() -> int:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_learning_rates"))
    parser.add_argument("--rates", nargs="+", default=["5e-4", "2e-3", "5e-3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="train only these (the table needs both)")
    parser.add_argument("overrides", nargs="*", help="further section.key=value for all runs")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for rate in arguments.rates:
            for method in arguments.methods:
                score(arguments.out, method, rate, seed, arguments.overrides)
    if set(arguments.methods) != set(METHODS):
        return 0
    return table(arguments.out, arguments.rates, arguments.seeds)


def score(out: Path, method: str, rate: str, seed: int, overrides: list[str]) -> float:
    """Return the exact match on the test rows of one run, training it where it is not there yet."""
    folder = out / f"{method}-{rate}-{seed}"
    summary = folder / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "train.py", "--recipe", f"smollm2_{method}", f"training.lr={rate}"]
        command += [f"training.seed={seed}", "data.validation=null", f"output.dir={folder}", *overrides]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return float(json.loads(summary.read_text(encoding="utf-8"))["test"]["test/exact_match"])


def table(out: Path, rates: list[str], seeds: list[int]) -> int:
    """Print mean, range and standard error by rate; return the exit code."""
    print("| learning rate | LoRA r 16: mean (range) | GLoRA r 8: mean (range) | difference | standard error |")
    print("|---|---|---|---|---|")
    means: dict[str, list[float]] = {method: [] for method in METHODS}
    errors, failed = [], False
    for rate in rates:
        runs = {method: [score(out, method, rate, seed, []) for seed in seeds] for method in METHODS}
        error = math.sqrt(sum(_squared_error(values) for values in runs.values()))
        for method, values in runs.items():
            means[method].append(statistics.mean(values))
        gain = means["glora"][-1] - means["lora"][-1]
        failed |= gain < -error
        errors.append(error)
        cells = [f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in runs.values()]
        print(f"| {rate} | {cells[0]} | {cells[1]} | {gain:+.3f} | {error:.3f} |")
    best = {method: max(values) for method, values in means.items()}
    print(f"\nbest: LoRA {best['lora']:.3f}, GLoRA {best['glora']:.3f}")
    return int(failed or best["glora"] < best["lora"] - max(errors))


def _squared_error(values: list[float], rows: int = 200) -> float:
    """Squared standard error of a mean over seeds: the binomial one of the test rows, or the seeds' own if larger."""
    mean = statistics.mean(values)
    binomial = mean * (1 - mean) / (rows * len(values))
    seeds = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
    return max(binomial, seeds)


if __name__ == "__main__":
    raise SystemExit(main())
