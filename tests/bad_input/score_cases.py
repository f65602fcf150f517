"""Benchmarks by lm-eval, the best checkpoint, trackers."""

from tests.bad_input.case import Case, bad, file
from tests.bad_input.run_cases import run

EVERY = "evaluation.every=1"
ASKED = ("evaluate", "embedded:tiny-llama", "--tasks", "mine")
SCORES: dict[str, Case] = {
    "keep_best of no score": bad(
        "'acuracy' is no score. Did you mean 'accuracy'?", EVERY, "evaluation.keep_best=acuracy"
    ),
    "keep_best of a score that the task has not": bad(
        "evaluation.keep_best is label_accuracy, which this task does not report.",
        EVERY,
        "evaluation.keep_best=label_accuracy",
    ),
    "keep_best without every": bad(
        "evaluation.keep_best=true compares validations during training, and evaluation.every is not set",
        "evaluation.keep_best=true",
    ),
    "patience without every": bad(
        "evaluation.patience=3 compares validations during training, and evaluation.every is not set",
        "evaluation.patience=3",
    ),
    "patience of 0": bad("evaluation.patience: got 0 (integer), expected", EVERY, "evaluation.patience=0"),
    "keep_best of a supernet": bad(
        "evaluation.keep_best=true goes by the validations of one model, and adapter.paths=sample trains a supernet",
        EVERY,
        "evaluation.keep_best=true",
        "adapter.paths=sample",
    ),
    "an unknown tracker": bad(
        "output.trackers.0: got 'wandbb' (text), expected 'wandb' or 'trackio'. Did you mean 'wandb'?",
        "output.trackers=[wandbb]",
    ),
    "a tracker that is not installed": bad("not installed: pip install trackio", "output.trackers=[trackio]"),
    "merge --best of a run that keeps none": bad(
        "--best: run was trained without evaluation.keep_best",
        change=run(),
        command=("merge", "run", "--out", "m", "--best"),
    ),
    "evaluate --best of a run that keeps none": bad(
        "--best: run was trained without evaluation.keep_best", change=run(), command=("evaluate", "run", "--best")
    ),
    "merge --best and --step": bad(
        "--best and --step 2 both choose a checkpoint",
        change=run(),
        command=("merge", "run", "--out", "m", "--best", "--step", "2"),
    ),
    "evaluate --merged and --best": bad(
        "--merged and --best each say which weights are scored",
        change=run(),
        command=("evaluate", "run", "--merged", "m", "--best"),
    ),
    "a benchmark that is not in the catalogue": bad(
        "'sst3' is no benchmark. Did you mean 'sst2'?", command=("tasks", "sst3")
    ),
    "a method that misreads a quantised weight": bad(
        "adapter.method hra does not train on a base in nf4", "adapter.method=hra", "model.quantization=nf4"
    ),
    "--tasks of nothing": bad("--tasks names nothing", command=("evaluate", "embedded:tiny-llama", "--tasks", ",")),
    "--few-shot without --tasks": bad(
        "--few-shot is for tasks of lm-eval: give --tasks NAMES too", command=("evaluate", "run", "--few-shot", "2")
    ),
    "--few-shot below 0": bad("--few-shot is -1; expected a number of at least 0", command=(*ASKED, "--few-shot=-1")),
    "--limit of 0": bad("--limit is 0; expected a number of at least 1", command=(*ASKED, "--limit", "0")),
    "--task-folder that is not there": bad(
        "--task-folder absent is no folder", command=(*ASKED, "--task-folder", "absent")
    ),
    "--task-folder without a task": bad(
        "--task-folder tasks holds no YAML file of a task",
        change=file("tasks/notes.txt", "x"),
        command=(*ASKED, "--task-folder", "tasks"),
    ),
    "--tasks with --split": bad(
        "--split is about the run's own records", command=("evaluate", "run", "--tasks", "mine", "--split", "test")
    ),
    "--tasks of a folder that is neither run nor model": bad(
        "other is neither a run (it has no recipe.yaml) nor a model (no config.json)",
        change=file("other/x", "x"),
        command=("evaluate", "other", "--tasks", "mine"),
    ),
    "--step of a model": bad(
        "embedded:tiny-llama is no run folder, and --merged, --step, --genome choose among a run's weights",
        command=(*ASKED, "--step", "2"),
    ),
}
