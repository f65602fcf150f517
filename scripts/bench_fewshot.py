"""Few-shot on a ViT of our own: GLoRA, LoRA, the linear head alone and full training, on classes that it has not seen.

  GLORA_DATA=FOLDER python scripts/bench_fewshot.py [--out runs/bench_fewshot]

A small ViT (6 layers of width 128, patches of 8) is trained from random weights on six classes of CIFAR-10
(FOLDER/cifar10/train.parquet and test.parquet), then adapted to 4 and 16 images of each of the other four: automobile,
deer, dog, ship. For each method and number of images, the rate of four is taken whose mean accuracy over three draws is
best on 400 validation images; 1,000 test images judge. Runs that are finished are not repeated, so the command may be
stopped and started again. Everything else is the recipe vit_fewshot_glora or _lora.
"""

import argparse
import json
import math
import os
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from glora_llm.cli import main as glora_llm
from glora_llm.data.sources import find_path
from glora_llm.errors import UserError
from glora_llm.launch import ranks

NEW = ("automobile", "deer", "dog", "ship")
MODEL = (
    "{model_type: vit, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 6, num_attention_heads: 4, "
    "patch_size: 8}"
)
SCALE = "mean: [0.49, 0.48, 0.45], std: [0.25, 0.24, 0.26]"
METHODS = {
    "GLoRA r 4": ("vit_fewshot_glora", ["adapter.rank=4", "adapter.alpha=8"]),
    "LoRA r 8": ("vit_fewshot_lora", ["adapter.rank=8", "adapter.alpha=16"]),
    "head alone": ("vit_fewshot_glora", ["adapter.slots={A: none}"]),
    "full": ("vit_fewshot_lora", ["adapter={method: full}"]),
}
AGAINST = "LoRA r 8"
SIGNIFICANT = 0.05
RATES = {  # four by method, a factor of four apart
    "GLoRA r 4": ("6e-5", "2.5e-4", "1e-3", "4e-3"),
    "LoRA r 8": ("6e-5", "2.5e-4", "1e-3", "4e-3"),
    "head alone": ("2.5e-4", "1e-3", "4e-3", "1.6e-2"),
    "full": ("1.5e-5", "6e-5", "2.5e-4", "1e-3"),
}
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Runs = dict[tuple[str, int], list[dict[str, Any]]]  # (method, shots) -> summaries of the draws


def main() -> int:
    """Split the data, train the base, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_fewshot"))
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2400, help="of the base's training, 64 images each")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    data = split(arguments.out / "data")
    base = train_base(arguments.out / "pretrained", data / "first", arguments.steps)
    found: Runs = {}
    rates = {}
    for shots in arguments.shots:
        for method in METHODS:
            place = arguments.out / f"{shots}-{method.replace(' ', '_')}"
            tried = {
                rate: [adapt(place, base, data, method, shots, draw, rate) for draw in range(arguments.draws)]
                for rate in RATES[method]
            }
            rate = max(tried, key=lambda rate: sum(run["validation"]["validation/accuracy"] for run in tried[rate]))
            rates[method, shots], found[method, shots] = rate, tried[rate]
    print(report(found, rates, json.loads((arguments.out / "pretrained" / "summary.json").read_text(encoding="utf-8"))))
    return 0


def split(folder: Path) -> Path:
    """Write both tasks' images as parquet files, as the hub's data set has them but for their classes."""
    source = find_path("cifar10")
    if source is None:
        raise UserError("There is no folder cifar10: set GLORA_DATA to the folder that holds it.")
    for role in ("train", "test"):
        table = pyarrow.parquet.read_table(source / f"{role}.parquet")
        said = json.loads(table.schema.metadata[b"huggingface"])
        names, labels = said["info"]["features"]["label"]["names"], table["label"].to_pylist()
        for task in ("first", "second"):
            file = folder / task / f"{role}.parquet"
            chosen = [name for name in names if (name in NEW) == (task == "second")]
            number = {names.index(name): n for n, name in enumerate(chosen)}
            rows = [n for n, label in enumerate(labels) if label in number]
            column = pyarrow.array([number[labels[n]] for n in rows], pyarrow.int64())
            part = table.take(rows).set_column(table.schema.get_field_index("label"), "label", column)
            said["info"]["features"]["label"]["names"] = chosen
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                pyarrow.parquet.write_table(part.replace_schema_metadata({"huggingface": json.dumps(said)}), file)
    return folder


def train(folder: Path, recipe: str, *overrides: str) -> dict[str, Any]:
    """Train a recipe in this process unless its folder is finished; return its summary."""
    file = folder / "summary.json"
    if not file.is_file() or "test" not in json.loads(file.read_text(encoding="utf-8")):
        try:
            if glora_llm(["train", "--recipe", recipe, *overrides, f"output.dir={folder}"]) != 0:
                raise UserError(f"{folder} did not end; the message is above.")
        finally:
            ranks.stop()
            for name in LAUNCH:
                os.environ.pop(name, None)
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return summary


def train_base(folder: Path, data: Path, steps: int) -> Path:
    """Train the ViT on the first task; return the folder of its weights."""
    images = f"data.images={{crop_padding: 2, flip: true, {SCALE}}}"
    train(
        folder, "vit_cifar10_dense", f"model.config={MODEL}", f"data.source={data}", "data.validation=600", images,
        "data.max_test_rows=2000", "training.global_batch=64", "training.micro_batch=64", "training.epochs=null",
        f"training.steps={steps}", "training.log_every=20", "evaluation.every=800", "output.save_every=300",
        "merge.after_training=false",
    )  # fmt: skip
    return folder / "model"


def adapt(place: Path, base: Path, data: Path, method: str, shots: int, draw: int, rate: str) -> dict[str, Any]:
    """Train the base on the second task by one method, one draw of its images and one rate; return the summary."""
    recipe, adapter = METHODS[method]
    return train(
        place / f"{rate}-{draw}", recipe, *adapter, f"model.name_or_path={base}", f"data.source={data / 'second'}",
        "data.validation=400", "data.test=test", "data.max_test_rows=1000", f"data.shots={shots}",
        f"data.shots_seed={draw}", f"data.images={{crop_padding: 2, flip: true, {SCALE}}}",
        "training.global_batch=16", "training.micro_batch=16", "training.epochs=null", "training.steps=100",
        f"training.lr={rate}", "evaluation.batch=100", "output.save_every=100", "output.keep=1",
        "merge.after_training=false",
    )  # fmt: skip


def report(found: Runs, rates: dict[tuple[str, int], str], base: dict[str, Any]) -> str:
    """Return the table in Markdown: accuracy by method and images of each class, and the difference from LoRA."""
    lines = [
        f"The base: {base['trained_parameters']:,} parameters, accuracy {base['test']['test/accuracy']:.3f} on 2,000 "
        f"test images of its own six classes, {base['seconds'] / 60:.0f} minutes. ({date.today()})",
        "",
        f"| images a class | method | trained parameters | rate | test accuracy: mean (range) | against {AGAINST} |",
        "|---|---|---|---|---|---|",
    ]
    for (method, shots), runs in found.items():
        values = [run["test"]["test/accuracy"] for run in runs]
        others = [run["test"]["test/accuracy"] for run in found[AGAINST, shots]]
        lines.append(
            f"| {shots} | {method} | {runs[0]['trained_parameters']:,} | {rates[method, shots]} | "
            f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}) | {compare(values, others)} |"
        )
    return "\n".join(lines) + "\n"


def compare(values: list[float], others: list[float]) -> str:
    """Return the mean difference over the draws with its standard error; level: a paired t-test does not reach 5 %."""
    from scipy.stats import ttest_rel

    apart = [one - other for one, other in zip(values, others, strict=True)]
    if not any(apart) or len(apart) < 2:
        return ""
    error, mean = statistics.stdev(apart) / math.sqrt(len(apart)), statistics.mean(apart)
    word = "level" if ttest_rel(values, others).pvalue >= SIGNIFICANT else "better" if mean > 0 else "worse"
    return f"{mean:+.3f} ± {error:.3f}, {word}"


if __name__ == "__main__":
    raise SystemExit(main())
