"""Compare the methods of `glora-llm methods`: a ViT of our own on new classes, SmolLM2 on two text tasks; latencies.

  GLORA_DATA=FOLDER python scripts/bench_methods.py base          # train the ViT, and split CIFAR-10
  GLORA_DATA=FOLDER python scripts/bench_methods.py few_shot      # 16 images of each of four new classes
  GLORA_DATA=FOLDER python scripts/bench_methods.py all_images    # all 20,000 of them
  GLORA_DATA=FOLDER python scripts/bench_methods.py sst2          # SmolLM2-135M
  python scripts/bench_methods.py banking77                       # shipped with the package
  GLORA_DATA=FOLDER python scripts/bench_methods.py noah          # searched: its weights inherited, and trained anew
  python scripts/bench_methods.py latency                         # of each method that few_shot and sst2 trained
  python scripts/bench_methods.py table                           # of what has ended

FOLDER holds cifar10 (train.parquet, test.parquet) and sst2 (train.parquet, validation.parquet). What is done is not
done again; --seeds adds seeds. The middle four are `glora-llm compare`, whose command is printed.
"""

import argparse
import gc
import json
import shlex
import sys
import tempfile
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the script is run by its path

from glora_llm.adapters.methods import METHODS
from glora_llm.cli import main as glora_llm
from glora_llm.compare.outcome import rate_text
from glora_llm.errors import UserError
from glora_llm.evaluation.trained import load_adapted, load_merged, whole_model
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.models.load import load_base
from glora_llm.plan.plan import Plan, make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.report import timing
from scripts import bench_fewshot

FAMILIES = (
    "lora,rslora,dora,lora_dropout,periodic_lora,lors,adalora,glora,full,ia3,ln_tuning,repadapter,ssf,houlsby,pfeiffer,"
    "adaptformer,parallel_adapter,compacter"
)
PROMPTS = "p_tuning,p_tuning_v2,prefix_tuning,prompt_tuning"
OTHERS = (
    "beft,boft,c3a,deft,delora,fourierft,gralora,hira,hra,lily,loha,lokr,miss,oft,osf,peanut,psoft,pvera,randlora,road,"
    "supertuning,vera,waveft"
)
TEXT = [
    "--recipe", "smollm2_glora", "--methods", f"{FAMILIES},{PROMPTS}", "--budget", "900k", "--nearest",
    "--rates", "5e-4,2e-3,8e-3,3.2e-2", "--full-rates", "1e-5,4e-5,1.6e-4", "--score", "label_accuracy",
    "--forgetting", "none", "model.dtype=bfloat16", "training.global_batch=8", "training.steps=24",
    "evaluation.every=8", "data.validation=100", "data.max_test_rows=200",
]  # fmt: skip
IMAGES = [
    "--recipe", "vit_fewshot_lora", "--budget", "40k", "--nearest", "--rates", "2.5e-4,1e-3,4e-3,1.6e-2",
    "--full-rates", "1.5e-5,6e-5,2.5e-4,1e-3", "--score", "accuracy", "data.validation=400", "data.test=test",
    "data.max_test_rows=1000", f"data.images={{crop_padding: 2, flip: true, {bench_fewshot.SCALE}}}",
    "training.epochs=null", "evaluation.batch=100", "output.save_every=100", "merge.after_training=false",
]  # fmt: skip
TASKS = {
    "few_shot": [
        *IMAGES, "--methods", f"{FAMILIES},noah,vpt,{OTHERS}", "data.shots=16", "training.global_batch=16",
        "training.micro_batch=16", "training.steps=100", "evaluation.every=50",
    ],
    "all_images": [
        *IMAGES, "--methods", f"{FAMILIES},noah,vpt", "data.shots=null", "data.shots_seed=null",
        "training.global_batch=32", "training.micro_batch=32", "training.steps=300", "evaluation.every=100",
    ],
    "sst2": [
        *TEXT, "data.source=sst2/train.parquet", "data.test=sst2/validation.parquet",
        'data.prompt="Review: {sentence}\\nSentiment:"', "data.columns={label: label}",
        "data.labels=[negative, positive]",
    ],
    "banking77": TEXT,
}  # fmt: skip
NOAH = [
    "adapter.supernet={sizes: {adapter: [0, 5, 10, 25], lora: [0, 2, 4, 8], prompt: [0, 5, 10, 25]}}", "data.shots=16",
    "data.validation=400", "data.test=test", "data.max_test_rows=1000",
    f"data.images={{crop_padding: 2, flip: true, {bench_fewshot.SCALE}}}", "training.global_batch=16",
    "training.micro_batch=16", "training.epochs=null", "training.steps=300", "training.lr=1e-3",
    "training.weight_decay=0.0001", "search.budget=40k", "search.population=20", "search.parents=5",
    "search.generations=6", "search.retrain_steps=100", "search.retrain_lr=1e-3", "evaluation.batch=100",
    "output.save_every=300",
]  # fmt: skip
TIMED = {"few_shot": "16 images of 32 x 32 pixels", "sst2": "64 tokens"}
ROUNDS = 25
BASE_STEPS = 9000


def main() -> int:
    """Do what the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["base", *TASKS, "noah", "latency", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_methods"))
    parser.add_argument("--seeds", default="3")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.what == "base":
        data = bench_fewshot.split(out / "data")
        print(bench_fewshot.train_base(out / "base", data / "first", BASE_STEPS))
    elif arguments.what == "noah":
        print(noah(out))
    elif arguments.what == "latency":
        for task in TIMED:
            measure(out, task)
    elif arguments.what == "table":
        print(table(out))
    else:
        return compare(out, arguments.what, arguments.seeds)
    return 0


def compare(out: Path, task: str, seeds: str) -> int:
    """Run the comparison of a task, and return its exit code."""
    command = ["compare", *TASKS[task], "--seeds", seeds, "--out", str(out / task)]
    if "vit_fewshot_lora" in command:
        command += [f"model.name_or_path={out / 'base' / 'model'}", f"data.source={out / 'data' / 'second'}"]
    print("glora-llm", shlex.join(command), flush=True)
    return glora_llm(command)


def noah(out: Path) -> str:
    """Search NOAH's structure on three draws of images; return the test accuracies in Markdown."""
    lines = ["| draw | all of the supernet | found, inherited | found, trained anew |", "|---|---|---|---|"]
    for draw in range(3):
        place = [f"model.name_or_path={out / 'base' / 'model'}", f"data.source={out / 'data' / 'second'}"]
        draws = [f"data.shots_seed={draw}", f"training.seed={draw}"]
        summary = bench_fewshot.train(out / f"noah-{draw}", "vit_fewshot_noah", *NOAH, *place, *draws)
        scores = [summary[key]["test/accuracy"] for key in ("test", "test_genome", "test_retrained")]
        lines.append(f"| {draw} | {' | '.join(f'{score:.3f}' for score in scores)} |")
    return "\n".join(lines)


def comparison(out: Path, task: str) -> dict[str, Any]:
    """Return what a comparison found; nothing where it was not made."""
    file = out / task / "comparison.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"methods": []}


@torch.no_grad()
def measure(out: Path, task: str) -> None:
    """Time the forward pass of each method's model, beside it and merged, against its base in alternating passes."""
    quiet_libraries()
    torch.set_num_threads(1)
    found = {}
    for row in comparison(out, task)["methods"]:
        if "trials" not in row:
            continue
        run = RunFolder(Path(row["trials"][0]))
        plan = make_plan(run.recipe())
        whole = whole_model(plan, run.model, None) if plan.recipe.adapter.is_full else nullcontext(run.adapter)
        with whole as weights, tempfile.TemporaryDirectory() as folder:
            adapted = load_adapted(plan, weights, torch.float32)
            found[row["name"]] = {"adapted": ratio(plan, adapted)}
            del adapted
            if not METHODS[row["name"]].unmerged:
                place = Path(folder) / "merged"
                if glora_llm(["merge", str(run.path), "--out", str(place), "--dtype", "float32", "--no-compare"]) != 0:
                    raise UserError(f"{run.path} was not merged; the message is above.")
                found[row["name"]]["merged"] = ratio(plan, load_merged(place, torch.float32))
        print(row["name"], found[row["name"]], flush=True)
    (out / task / "latency.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def ratio(plan: Plan, model: Any) -> float:
    """Return the seconds of a model's pass over those of its base: the median over rounds of one pass of each."""
    section = plan.recipe.model.model_copy(update={"dtype": "float32"})
    base = load_base(section, plan.base.folder, torch.device("cpu")).eval()
    model.set_attn_implementation("sdpa")
    base.set_attn_implementation("sdpa")
    if plan.recipe.data.format == "images":
        inputs: dict[str, Any] = {"pixel_values": torch.zeros(16, 3, base.config.image_size, base.config.image_size)}
    else:
        inputs = {"input_ids": torch.arange(64)[None], "use_cache": False}
    gc.freeze()  # a collection before each pass would take longer than the pass
    steps = {"own": partial(model, **inputs), "base": partial(base, **inputs)}
    return timing.ratio(timing.interleaved(steps, ROUNDS), "own", "base")


def table(out: Path) -> str:
    """Return the tables in Markdown: a column a task, then the latencies."""
    found = {task: comparison(out, task) for task in TASKS}
    columns = {task: {row["name"]: row for row in each["methods"]} for task, each in found.items()}
    times = {
        task: json.loads((out / task / "latency.json").read_text(encoding="utf-8"))
        for task in TIMED
        if (out / task / "latency.json").is_file()
    }
    lines = [f"({date.today()}, {next(each['hardware']['cpu'] for each in found.values() if each['methods'])})", ""]
    for kind, tasks in (("images", ("few_shot", "all_images")), ("text", ("sst2", "banking77"))):
        names = [name for name in METHODS if any(name in columns[task] for task in tasks)]
        timed = next(task for task in tasks if task in TIMED)
        heads = [f"{task}: rate | {task}: score | p" for task in tasks]
        lines += [
            f"| {kind}: method | parameters | {' | '.join(heads)} | latency | merged |",
            "|---" * (4 + 3 * len(tasks)) + "|",
        ]
        order = sorted(names, key=lambda name: -(columns[tasks[0]].get(name, {}).get("mean") or 0.0))
        for name in order:
            cells = [cell for task in tasks for cell in scored(columns[task].get(name))]
            known = next(columns[task][name] for task in tasks if name in columns[task])
            own = times.get(timed, {}).get(name, {})
            passes = [f"{own[key]:.2f}" if key in own else "" for key in ("adapted", "merged")]
            lines.append(f"| {name} | {known['parameters'] or 0:,} | {' | '.join([*cells, *passes])} |")
        lines.append("")
    return "\n".join(lines)


def scored(row: dict[str, Any] | None) -> tuple[str, str, str]:
    """Return the cells of a method in a task: rate, score, p."""
    if row is None or "mean" not in row:
        return "", "" if row is None else row["verdict"], ""
    reach = f" ({row['low']:.3f} to {row['high']:.3f})" if len(row["scores"]) > 1 else ""
    p = row["p_value"]
    said = "best" if row["verdict"] == "best" else "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
    return f"{rate_text(row['lr'])}{'*' if row['lr_at_edge'] else ''}", f"{row['mean']:.3f}{reach}", said


if __name__ == "__main__":
    raise SystemExit(main())
