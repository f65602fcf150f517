"""4 bits in, 4 bits out: lossless4 against LoRA at equal parameters, and what each loses when merged into nf4.

  python scripts/bench_lossless4.py --out runs/bench_lossless4 [--seeds 0] [--rates lora=5e-3,1e-2 lossless4=1e-2,2e-2]

SmolLM2-135M in nf4, Banking77. Each run is `train.py` in a process of its own; runs and scores that are there are not
made again, so the command may be stopped and started. Then the best run of each method is merged into 4 bits, loaded by
plain transformers and scored on the same 200 test records. Prints two Markdown tables; exits with 1 when lossless4
changed a 4-bit code.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

# `glora` is the default slots, of the recipe's size; the other two have equal parameters: 0.61 M and 0.62 M.
TRAINED: dict[str, list[str]] = {
    "lora": ["smollm2_lora", "model.quantization=nf4", "adapter.rank=2", "adapter.alpha=4"],
    "lossless4": ["smollm2_lossless4", "adapter.rank=2", "adapter.alpha=4"],
    "glora": ["smollm2_glora", "model.quantization=nf4"],
}
RATES = {"lora": ["5e-3", "1e-2", "2e-2"], "lossless4": ["1e-2", "2e-2", "4e-2"], "glora": ["2e-3"]}
ROWS = 200


def main() -> int:
    """Train what is missing, then merge and score the best of each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_lossless4"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="the merge is of the first")
    parser.add_argument("--rates", nargs="+", default=[], metavar="METHOD=RATE,RATE", help="in place of the usual ones")
    parser.add_argument("--merge", metavar="RUN", type=Path, help=argparse.SUPPRESS)  # one merge, in this process
    arguments = parser.parse_args()
    if arguments.merge:
        merge_and_score(arguments.merge)
        return 0
    rates = RATES | {name: text.split(",") for name, _, text in (each.partition("=") for each in arguments.rates)}
    runs = {
        method: {rate: [train(arguments.out, method, rate, seed) for seed in arguments.seeds] for rate in rates[method]}
        for method in TRAINED
    }
    print_trained(runs)
    best = {method: max(by_rate.values(), key=mean_exact)[0] for method, by_rate in runs.items()}
    return print_merged({method: merged(run) for method, run in best.items()})


def train(out: Path, method: str, rate: str, seed: int) -> Path:
    """Return a run folder, after training it where it is not there yet."""
    folder = out / f"{method}-{rate}-{seed}"
    if not (folder / "summary.json").is_file():
        recipe, *overrides = TRAINED[method]
        command = [sys.executable, "train.py", "--recipe", recipe, *overrides, f"training.lr={rate}"]
        command += [f"training.seed={seed}", "data.validation=null", f"output.dir={folder}"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return folder


def summary(run: Path) -> dict[str, Any]:
    """Return the summary of a run."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return found


def mean_exact(runs: list[Path]) -> float:
    """Return the mean exact match of the runs of one rate."""
    return sum(float(summary(run)["test"]["test/exact_match"]) for run in runs) / len(runs)


def print_trained(runs: dict[str, dict[str, list[Path]]]) -> None:
    """Print loss and exact match by method and rate, and the difference of the best ones."""
    print("| method | parameters | learning rate | test loss | exact match |")
    print("|---|---|---|---|---|")
    for method, by_rate in runs.items():
        for rate, folders in by_rate.items():
            found = [summary(run) for run in folders]
            loss = sum(s["test"]["test/loss"] for s in found) / len(found)
            millions = found[0]["trained_parameters"] / 1e6
            print(f"| {method} | {millions:.3f} M | {rate} | {loss:.4f} | {mean_exact(folders):.3f} |")
    best = {method: max(mean_exact(folders) for folders in by_rate.values()) for method, by_rate in runs.items()}
    count = ROWS * len(next(iter(runs["lora"].values())))
    error = math.sqrt(sum(best[m] * (1 - best[m]) / count for m in ("lora", "lossless4")))
    gap = best["lossless4"] - best["lora"]
    worse = "lossless4 trains WORSE than LoRA by more than a standard error" if gap < -error else "within or above it"
    print(f"\nlossless4 against LoRA, each at its best rate: {gap:+.3f}, standard error {error:.3f}: {worse}\n")


def merged(run: Path) -> dict[str, Any]:
    """Return the scores of a run merged into 4 bits, made in a process of its own where they are not there yet."""
    place = run.with_name(f"{run.name}.4bit.json")
    if not place.is_file():
        subprocess.run([sys.executable, __file__, "--merge", str(run)], check=True)
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def merge_and_score(run: Path) -> None:
    """Merge one run into nf4 in its way, load the folder by plain transformers and write its scores."""
    from transformers import AutoModelForCausalLM

    from glora_llm.evaluation.scoring import score_model
    from glora_llm.models.load import keep_quantized_weights
    from glora_llm.plan.elsewhere import recipe_for_scores
    from glora_llm.plan.plan import make_plan
    from glora_llm.plan.run_folder import RunFolder

    folder = RunFolder(run)
    plan = make_plan(recipe_for_scores(folder, folder.recipe(), "test"))
    out = run.with_name(f"{run.name}.4bit")
    if not out.exists():
        {"lossless4": by_blocks, "glora": dense_then_nf4, "lora": by_peft}[run.name.partition("-")[0]](run, out, plan)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto", local_files_only=True).eval()
    keep_quantized_weights(model)
    codes, changed = changed_codes(model, plan)
    values = {
        "before": summary(run)["test"], "after": score_model(plan, model, "test"), "codes": codes, "changed": changed,
        "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
    }  # fmt: skip
    run.with_name(f"{out.name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def by_blocks(run: Path, out: Path, _: Any) -> None:
    """`glora-llm merge --quantize nf4_lossless`."""
    from glora_llm.merge.command import merge_run

    merge_run(run, out, quantize="nf4_lossless")


def dense_then_nf4(run: Path, out: Path, plan: Any) -> None:
    """Merge into dense float32 weights, quantised again on loading, with the settings of the base."""
    import torch
    from transformers import AutoModelForCausalLM

    from glora_llm.merge.command import merge_run
    from glora_llm.models.load import quantization_config

    dense = out.with_name(f"{run.name}.dense")
    if not dense.exists():
        merge_run(run, dense, dtype="float32", quantize="none")
    settings = quantization_config(plan.recipe.model, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, quantization_config=settings)
    model.save_pretrained(out)


def by_peft(run: Path, out: Path, plan: Any) -> None:
    """PEFT's `merge_and_unload` of a LoRA on a 4-bit base: the merged weight is quantised again."""
    import torch
    from peft import PeftModel

    from glora_llm.models.load import load_base

    base = load_base(plan.recipe.model, plan.base.folder, torch.device("cpu"))
    PeftModel.from_pretrained(base, str(run / "adapter")).merge_and_unload().save_pretrained(out)


def changed_codes(model: Any, plan: Any) -> tuple[int, int]:
    """Return the 4-bit codes of a loaded model, and how many are not those of the base."""
    import torch

    from glora_llm.models.load import linear_names, load_base

    base, codes, changed = load_base(plan.recipe.model, plan.base.folder, torch.device("cpu")), 0, 0
    for name in linear_names(base):
        own, found = (m.get_submodule(name).weight.data.view(torch.uint8).reshape(-1) for m in (base, model))
        codes += 2 * len(own)
        changed += sum(int(((own >> shift) & 15 != (found >> shift) & 15).sum()) for shift in (0, 4))
    return codes, changed


def print_merged(found: dict[str, dict[str, Any]]) -> int:
    """Print what the merges cost; return the exit code."""
    print("| merged into nf4 | 4-bit codes changed | loss before | after | exact match before | after | MB |")
    print("|---|---|---|---|---|---|---|")
    ways = {
        "lossless4": "lossless4: the base's codes, new scales",
        "glora": "default slots: dense, quantised again",
        "lora": "LoRA: PEFT's merge, quantised again",
    }
    for method, title in ways.items():
        v = found[method]
        cells = [f"{v[when]['test/loss']:.4f}" for when in ("before", "after")]
        cells += [f"{v[when]['test/exact_match']:.3f}" for when in ("before", "after")]
        share = f"{v['changed']:,} of {v['codes']:,} ({v['changed'] / v['codes']:.1%})"
        print(f"| {title} | {share} | {' | '.join(cells)} | {v['bytes'] / 1e6:.1f} |")
    return int(found["lossless4"]["changed"] != 0)


if __name__ == "__main__":
    raise SystemExit(main())
