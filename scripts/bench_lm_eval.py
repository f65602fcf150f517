"""Time `glora-llm evaluate --tasks` on a merged model and on its adapter, beside lm-eval's own command on that model.

python scripts/bench_lm_eval.py [--data FILE] [--questions 200] [--rounds 2]

FILE: ARC-Easy as records of LLM-Adapters' commonsense data ({"instruction": "... Answer1: ...", "answer": "answer1"}).
The commands are processes of their own, start-up included, one after the other in every round.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = [sys.executable, "-m", "glora_llm"]
SHORT = ["training.steps=1", "data.max_rows=200", "data.validation=null", "data.test=null"]
SHORT += ["training.global_batch=1", "training.micro_batch=1"]
TASK = """\
task: arc_easy_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
OPTION = re.compile(r"\s*Answer\d+: (.*?)(?=\s*Answer\d+: |\s*\n)", re.DOTALL)


def write_task(data: Path, folder: Path) -> None:
    """Write the questions and options of the records as a task of lm-eval."""
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for record in json.loads(data.read_text(encoding="utf-8")):
            text = record["instruction"].partition("the question: ")[2]
            row = {
                "question": text.partition("\n")[0].strip(),
                "choices": OPTION.findall(text),
                "answer": int(record["answer"].removeprefix("answer")) - 1,
            }
            file.write(json.dumps(row) + "\n")
    (folder / "arc_easy_here.yaml").write_text(TASK.format(rows=rows), encoding="utf-8")


def timed(command: list[str]) -> tuple[float, float]:
    """Return (wall seconds, CPU seconds) of a command."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu


def commands(run: Path, merged: Path, folder: Path, task: str, questions: int) -> dict[str, list[str]]:
    """Return the three commands by name; each writes its scores below `folder`."""
    asked = ["--tasks", task, "--limit", str(questions)]
    evaluate = [*OURS, "evaluate", str(run), "--task-folder", str(folder), *asked]
    theirs = ["--model", "hf", "--model_args", f"pretrained={merged},dtype=float32", "--device", "cpu"]
    theirs += ["--include_path", str(folder), "--batch_size", "8", "--output_path", str(folder / "lm"), *asked]
    return {
        "lm-eval, merged": [sys.executable, "-m", "lm_eval", *theirs],
        "evaluate --merged": [*evaluate, "--merged", str(merged), "--out", str(folder / "merged.json")],
        "evaluate, unmerged": [*evaluate, "--out", str(folder / "run.json")],
    }


def main() -> None:
    """Train one step, merge, and time the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="test.json of ARC-Easy (default: examples/lm_eval, 24 questions)")
    parser.add_argument("--recipe", default="smollm2_glora", help="a run of one step of it is made")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place:
        folder, run, merged = Path(place), Path(place, "run"), Path(place, "merged")
        if arguments.data:
            task = "arc_easy_here"
            write_task(arguments.data, folder)
        else:
            task = "capitals"
            shutil.copy("examples/lm_eval/capitals.yaml", folder)
        timed([*OURS, "train", "--recipe", arguments.recipe, f"output.dir={run}", *SHORT])
        timed([*OURS, "merge", str(run), "--out", str(merged), "--dtype", "float32", "--no-compare"])
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(arguments.rounds):
            for name, command in commands(run, merged, folder, task, arguments.questions).items():
                found.setdefault(name, []).append(timed(command))
        for name, times in found.items():
            wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{name:20} {wall:8.1f} s, {cpu:8.1f} s of CPU (median of {len(times)})")
        theirs = max(Path(place, "lm").rglob("results_*.json"))
        print("lm-eval:", json.loads(theirs.read_text(encoding="utf-8"))["results"][task])
        for name in ("merged", "run"):
            print(f"{name}:", json.loads(Path(place, f"{name}.json").read_text(encoding="utf-8"))["tasks"][task])


if __name__ == "__main__":
    main()
