"""What checkpoints cost: the share of training time at one per 100 steps, and how long a run takes to go on from one.

  python scripts/bench_checkpoint.py                       tiny_cpu, whose steps are the shortest of all recipes
  python scripts/bench_checkpoint.py --recipe smollm2_glora --steps 6 model.quantization=nf4

The same checkpoint is gone on from at step 10 and, with its step changed and a metrics.jsonl of as many lines, at step
1,000,000. On one process.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from glora_llm import recipe as recipes
from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.launch.stop import StopRequest, ToldToEnd
from glora_llm.run.saving import Saver
from glora_llm.run.train import train
from glora_llm.training import checkpoint
from glora_llm.training.engine import Engine

EVERY, FAR, NEAR, TRIALS = 100, 1_000_000, 10, 3


def main() -> None:
    """Measure both, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="tiny_cpu")
    parser.add_argument("--steps", type=int, default=200, help="of the run whose checkpoints are timed (default 200)")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        rare = ["data.validation=null", "data.test=null", "training.warmup=0", "evaluation.every=null"]
        settings = [*rare, *arguments.overrides]
        print_cost(arguments.recipe, settings, arguments.steps, Path(folder) / "cost")
        print_resume(arguments.recipe, settings, Path(folder))


def print_cost(recipe: str, settings: list[str], steps: int, run: Path) -> None:
    """Train with many checkpoints, and print what one costs beside a step."""
    seconds: list[float] = []
    timed = _timed(Saver.save_checkpoint, seconds)
    every = max(1, steps // 10)
    _train(recipe, [*settings, f"training.steps={steps}", f"output.save_every={every}"], run, {"save": timed})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    step = statistics.median(line["train/seconds_per_step"] for line in lines if "train/loss" in line)
    one = statistics.median(seconds)
    newest = checkpoint.newest(run / "checkpoints")
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) if newest else 0
    print(
        f"{recipe}: a step {1e3 * step:.1f} ms, a checkpoint of {size / 1e6:.2f} MB {1e3 * one:.1f} ms (median of "
        f"{len(seconds)}): {100 * one / (EVERY * step + one):.2f} % of the time at one per {EVERY} steps",
        flush=True,
    )


def print_resume(recipe: str, settings: list[str], folder: Path) -> None:
    """Go on from step 10 and from step 1,000,000, in turn, and print how long the first step took to be there."""
    settings = [*settings, f"training.steps={FAR + 1000}", f"output.save_every={NEAR}"]
    near, far = folder / "near", folder / "far"
    _train(recipe, settings, near, {"stop_after_save": True})
    _move(near, far)
    took: dict[Path, list[float]] = {near: [], far: []}
    for _ in range(TRIALS):
        for run, times in took.items():
            kept = shutil.copytree(run, folder / "again")
            began = time.perf_counter()
            times.append(_train(recipe, settings, kept, {"stop_after_step": True}) - began)
            shutil.rmtree(kept)
    for run, step in ((near, NEAR), (far, FAR)):
        each = ", ".join(f"{seconds:.2f}" for seconds in took[run])
        print(f"{recipe}: going on from step {step:,}: {statistics.median(took[run]):.2f} s to the first step ({each})")


def _move(near: Path, far: Path) -> None:
    """Copy a run, as if it had done a million steps."""
    shutil.copytree(near, far)
    folder = (far / "checkpoints" / f"step-{NEAR}").rename(far / "checkpoints" / f"step-{FAR}")
    trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    (folder / "trainer.json").write_text(json.dumps(trainer | {"step": FAR}), encoding="utf-8")
    (folder / checkpoint.MANIFEST).unlink()
    checkpoint.write_manifest(folder)
    assert checkpoint.newest(far / "checkpoints") == folder
    line = json.loads((far / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    with (far / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line | {"step": step}) + "\n" for step in range(1, FAR + 1))


def _timed(save: Callable[..., None], seconds: list[float]) -> Callable[..., None]:
    def timed(saver: Saver, *rest: Any) -> None:
        began = time.perf_counter()
        save(saver, *rest)
        seconds.append(time.perf_counter() - began)

    return timed


def _train(recipe: str, settings: list[str], run: Path, how: dict[str, Any]) -> float:
    """Train until the end, or until a checkpoint or a step is done; return when that was."""
    save, step, stop, ended = Saver.save_checkpoint, Engine.train_step, StopRequest(), [0.0]

    def saved(saver: Saver, *rest: Any) -> None:
        (how.get("save") or save)(saver, *rest)
        if "stop_after_save" in how:
            stop.reason = "the benchmark"

    def stepped(engine: Engine, *rest: Any) -> Any:
        result = step(engine, *rest)
        if "stop_after_step" in how:
            ended[0] = ended[0] or time.perf_counter()
            stop.reason = "the benchmark"
        return result

    saver_class: Any = Saver
    engine_class: Any = Engine
    saver_class.save_checkpoint, engine_class.train_step = saved, stepped
    try:
        train(recipes.load(recipe, [*settings, f"output.dir={run}"]), stop=stop)
    except ToldToEnd:
        pass
    finally:
        saver_class.save_checkpoint, engine_class.train_step = save, step
        ranks.stop()
    return ended[0]


if __name__ == "__main__":
    main()
