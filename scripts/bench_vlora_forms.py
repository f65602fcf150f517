"""Forms of VLoRA against dense models of full and of equal size, over seeds: text, images, and from a dense model.

  GLORA_DATA=FOLDER python scripts/bench_vlora_forms.py [text|images|from-dense] [--steps 1500] [--seeds 0 1 2]
      [--forms dense dense-narrow dense-shallow dense-middle paper gains-all] [--jobs 2] [--dtype bfloat16]
      [--figure docs/figures/vlora_bytes.svg]

text        a 12-layer LLaMA of width 256, vocabulary 4,000, 8 rows of 128 tokens a step, on FOLDER/wikitext2
images      an 8-layer ViT of width 192 on patches of 4, 64 images a step, crop and flip, on FOLDER/cifar10
from-dense  SmolLM2-135M at 50 % of its linears, trained on FOLDER/wikitext2, 8 rows of 256 tokens a step

dense-narrow and dense-shallow are saved in as many bytes as the form `paper`, dense-middle lies between; their sizes
are solved for first. Each run is a command of the package in a process and on a thread of its own. A finished run is
not repeated and a stopped one goes on from its checkpoint, so the command may be stopped (Ctrl-C, SIGTERM) and started.
Runs of other --overrides lie in a folder of their own. Prints a Markdown table; --figure draws score against bytes;
--list prints the forms and what each changes; --table-only trains nothing. `plateau`: the first step from which on the
mean training loss of 10 steps is below the entropy of single tokens (6.51 nats; 2.303 of classes). `to dense-narrow's
loss`: seconds of training steps, by seed.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # scripts/vlora_forms is no part of the package

from glora_llm.errors import UserError  # noqa: E402
from scripts.vlora_forms.forms import TABLES, TWINS, Table  # noqa: E402
from scripts.vlora_forms.runs import Run, command, run_all, solve_twins  # noqa: E402


def main() -> int:
    """Train what is missing, then print the table."""
    arguments = parse()
    table = TABLES[arguments.table]
    if arguments.list:
        print("\n".join(f"{name:18s} {' '.join(changes)}".rstrip() for name, changes in table.forms.items()))
        return 0
    unknown = [form for form in arguments.forms or () if form not in table.forms]
    if unknown:
        print(f"error: --forms {unknown[0]} is none of {', '.join(table.forms)}", file=sys.stderr)
        return 2
    forms = arguments.forms or list(table.forms)
    steps, lr = arguments.steps or table.steps, arguments.lr or table.lr
    changed = hashlib.sha256(json.dumps(arguments.overrides).encode()).hexdigest()[:8] if arguments.overrides else ""
    out = (
        arguments.out / arguments.table / "-".join(filter(None, (f"{steps}-steps-lr-{lr}-{arguments.dtype}", changed)))
    )
    failed: list[Path] = []
    if not arguments.table_only:
        absent = missing(table)
        if absent:
            print(f"error: GLORA_DATA must name a folder that holds {absent}", file=sys.stderr)
            return 2
        twins = solve_twins(table, arguments.overrides, out / "twins.json") if set(forms) & set(TWINS) else {}
        shared = [f"training.steps={steps}", f"training.lr={lr}", f"model.dtype={arguments.dtype}"]
        runs: list[Run] = [  # all forms of a seed first: a stopped command leaves a whole comparison
            (out / f"{form}-{seed}", command(table, form, seed, [*shared, *arguments.overrides], twins))
            for seed in arguments.seeds
            for form in forms
        ]
        try:
            failed = run_all(runs, arguments.jobs)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 75
    report(out, table, forms, arguments.seeds, arguments.figure)
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", nargs="?", choices=list(TABLES), default="text", help="(default: text)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_vlora_forms"))
    parser.add_argument("--steps", type=int, help="(default: 1,500; images 9,000; from-dense 600)")
    parser.add_argument("--forms", nargs="+", metavar="FORM", help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lr", help="training.lr of all runs (default: 1e-3; from-dense 3e-4)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="draw score against bytes: .svg, .png or .pdf")
    parser.add_argument("--list", action="store_true", help="print the forms")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="section.key=value", help="for all runs")
    return parser.parse_args()


def missing(table: Table) -> str:
    """Return the first file that GLORA_DATA should hold and does not; empty: all are there."""
    data = os.environ.get("GLORA_DATA")
    return next((name for name in table.files if not (data and (Path(data) / name).is_file())), "")


def report(out: Path, table: Table, forms: list[str], seeds: list[int], figure: Path | None) -> None:
    """Print what each form reached, and draw it where asked."""
    from scripts.vlora_forms.results import bytes_figure, dense_table, read_forms, training_table

    name, found = read_forms(out, table, forms, seeds)
    if not found:
        print(f"{out}: no run has ended")
        return
    print(training_table(table, name, found) if table.shared else dense_table(name, found))
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        bytes_figure(name, found).savefig(figure)
        print(f"\n{figure} written")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
