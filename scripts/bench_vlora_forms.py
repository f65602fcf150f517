"""Forms of VLoRA against dense on WikiText-2: bits per byte by parameters, over seeds.

  GLORA_DATA=FOLDER python scripts/bench_vlora_forms.py --steps 1500 [--forms dense paper gains-all] [--seeds 0 1 2]

FOLDER/wikitext2 holds train.txt, valid.txt and test.txt. The model is that of docs/benchmarks/vlora.md: a 12-layer
LLaMA of width 256, vocabulary 4,000, 8 rows of 128 tokens a step. Each run is `train.py --recipe vlora_lm` or
`dense_lm` in a process of its own. A finished run is not repeated and a stopped one goes on from its checkpoint, so the
command may be stopped and started. Prints a Markdown table; `--list` prints the forms and what each changes;
`--table-only` trains nothing. The column `plateau` is the first step from which on the mean training loss of 10 steps
is below the entropy of single tokens, 6.51 nats: until then a model knows no more than their frequencies.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL = (
    "{model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 12, num_attention_heads: 4, "
    "max_position_embeddings: 128, tie_word_embeddings: true}"
)
COMMON = [
    f"model.config={MODEL}", "model.tokenizer=train:4000", "data.max_tokens=128", "data.max_test_rows=500",
    "training.global_batch=8", "training.micro_batch=8", "data.validation=null", "evaluation.every=null",
    "merge.after_training=false", "output.save_every=100", "output.keep=1",
]  # fmt: skip
ENTROPY, SMOOTHED = 6.51, 10  # nats; steps
WIDE_ATTENTION = "{q_proj: 6, k_proj: 6, v_proj: 6, o_proj: 6, gate_proj: 3, up_proj: 3, down_proj: 3}"
# Name -> changes to vlora_lm (dense ones: to dense_lm). `paper` is the published form, at 28.7 % of the linears.
FORMS: dict[str, list[str]] = {
    "dense": [],
    "dense-muon": ["training.optimizer=muon"],
    "paper": [],
    "gains-row-column": ["vlora.gains=[row, column]"],
    "gains-diagonal": ["vlora.gains=[diagonal]"],
    "gains-all": ["vlora.gains=[row, column, diagonal]"],
    "attention-wider": [f"vlora.layers_per_compound={WIDE_ATTENTION}"],
    "cycle": ["vlora.sharing=cycle"],
    "star": ["vlora.topology=star"],
    "all-add": ["vlora.increments=all"],
    "start-kaiming": ["vlora.start=kaiming"],
    "start-small": ["vlora.start=small"],
    "norms-spread": ["vlora.norm_spread=0.1"],
    "rates-auto": ["vlora.lr_factors=auto"],
    "rates-b4": ["vlora.lr_factors={b: 4}"],
    "rates-b16": ["vlora.lr_factors={b: 16}"],
    "rates-base-half": ["vlora.lr_factors={base: 0.5}"],
    "rates-gain4": ["vlora.gains=[row, column]", "vlora.lr_factors={gain: 4}"],
    "no-decay": ["vlora.decay_increments=false"],
    "rank-16": ["vlora.rank=16"],
    "muon": ["training.optimizer=muon"],
    "muon-gains-rates": ["training.optimizer=muon", "vlora.gains=[row, column, diagonal]", "vlora.lr_factors=auto"],
}
SCORES = ("test/bits_per_byte", "test/loss")  # the first that a run has


def main() -> int:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_vlora_forms"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), metavar="FORM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lr", default="1e-3", help="training.lr of all runs (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the forms")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("overrides", nargs="*", help="further section.key=value for all runs")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:18s} {' '.join(changes)}".rstrip() for name, changes in FORMS.items()))
        return 0
    data = os.environ.get("GLORA_DATA")
    if not arguments.table_only and not (data and (Path(data) / "wikitext2" / "train.txt").is_file()):
        print("error: GLORA_DATA must name a folder that holds wikitext2/train.txt", file=sys.stderr)
        return 2
    out = arguments.out / f"{arguments.steps}-steps-lr-{arguments.lr}"
    settings = [f"training.steps={arguments.steps}", f"training.lr={arguments.lr}", *arguments.overrides]
    for seed in arguments.seeds:  # all forms of a seed first: a stopped command leaves a whole comparison
        for form in () if arguments.table_only else arguments.forms:
            train(out / f"{form}-{seed}", form, [f"training.seed={seed}", *settings])
    print_table(out, arguments.forms, arguments.seeds)
    return 0


def train(folder: Path, form: str, settings: list[str]) -> None:
    """Train one run where it is not finished, or go on with it; its log lies beside its folder."""
    if finished(folder) is not None:
        return
    recipe = "dense_lm" if form.startswith("dense") else "vlora_lm"
    command = [sys.executable, "train.py", "--recipe", recipe, *COMMON, *FORMS[form], *settings]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a", encoding="utf-8") as log:
        subprocess.run([*command, f"output.dir={folder}"], check=True, stdout=log, stderr=subprocess.STDOUT)


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run that has ended with test scores, else None."""
    file = folder / "summary.json"
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return summary if summary.get("test") else None


def plateau(folder: Path) -> float:
    """Return the first step at which the mean loss of the last steps is below the entropy; not-a-number: none is."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if line.get("train/loss") is not None}
    steps = sorted(losses)
    for place in range(SMOOTHED, len(steps) + 1):
        if statistics.mean(losses[step] for step in steps[place - SMOOTHED : place]) < ENTROPY:
            return steps[place - 1]
    return math.nan


def print_table(out: Path, forms: list[str], seeds: list[int]) -> None:
    """Print what each form reached: parameters, mean and range of the score, relative to dense, time, plateau."""
    found = {form: {seed: finished(out / f"{form}-{seed}") for seed in seeds} for form in forms}
    ended = {form: {seed: one for seed, one in runs.items() if one} for form, runs in found.items()}
    every = [one for runs in ended.values() for one in runs.values()]
    if not every:
        print(f"{out}: no run has ended")
        return
    name = next(name for name in SCORES if all(name in one["test"] for one in every))
    means = {form: statistics.mean(one["test"][name] for one in runs.values()) for form, runs in ended.items() if runs}
    print(f"| form | parameters | {name} (range, seeds) | of dense | plateau | seconds |\n|---|---|---|---|---|---|")
    for form, mean in sorted(means.items(), key=lambda pair: pair[1]):
        runs = ended[form]
        values = [one["test"][name] for one in runs.values()]
        leaves = ", ".join(f"{plateau(out / f'{form}-{seed}'):.0f}" for seed in runs)
        share = f"{mean / means['dense']:.3f}" if "dense" in means else "-"
        seconds = statistics.mean(one["seconds"] for one in runs.values())
        count = next(iter(runs.values()))["trained_parameters"]
        score = f"{mean:.4f} ({min(values):.4f} to {max(values):.4f}, {len(values)})"
        print(f"| {form} | {count:,} | {score} | {share} | {leaves} | {seconds:.0f} |")


if __name__ == "__main__":
    raise SystemExit(main())
