"""Run folders: what trains on, merges, scores and searches in them."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from glora_llm.cli import main
from glora_llm.launch import ranks
from tests.bad_input.case import Case, Change, bad, both, file, prepare, working_in


@cache
def trained() -> Path:
    """Train the recipe once, two steps, and return the folder; it lies where the other caches lie."""
    import os

    folder = Path(tempfile.mkdtemp(dir=os.environ.get("GLORA_CACHE")))
    prepare(folder)
    with working_in(folder, {}):
        try:
            assert main(["train", "--recipe", "recipe.yaml", "output.save_every=2"]) == 0
        finally:
            ranks.stop()
    return folder / "run"


def run(*changes: Change) -> Change:
    """Return what puts a trained run into the folder, and damages it."""

    def change(folder: Path) -> None:
        shutil.copytree(trained(), folder / "run")
        for one in changes:
            one(folder)

    return change


def instead(name: str) -> Change:
    """Return what puts a file in the place of a folder of the run, or a folder in the place of a file."""

    def change(folder: Path) -> None:
        place = folder / "run" / name
        if place.is_dir():
            shutil.rmtree(place)
            place.write_text("x")
        else:
            place.unlink()
            place.mkdir()

    return change


def cut(name: str) -> Change:
    def change(folder: Path) -> None:
        place = folder / "run" / name
        place.write_bytes(place.read_bytes()[: place.stat().st_size // 2])

    return change


def without_manifest(change: Change) -> Change:
    """Return a change that checksums cannot see, as an older run has none."""
    return both(lambda folder: (folder / "run" / "adapter" / "manifest.json").unlink(), change)


def with_tensors(fill: float) -> Change:
    def change(folder: Path) -> None:
        place = folder / "run" / "adapter" / "adapter_model.safetensors"
        save_file({name: torch.full_like(tensor, fill) for name, tensor in load_file(place).items()}, place)

    return change


ADAPTER, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
MERGE, EVALUATE = ("merge", "run", "--out", "merged"), ("evaluate", "run", "--split", "validation")


def _without_one(folder: Path) -> None:
    place = folder / "run" / ADAPTER
    tensors = load_file(place)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, place)


def _with_one_more(folder: Path) -> None:
    place = folder / "run" / ADAPTER
    save_file(load_file(place) | {"base_model.model.x.slot_B.down": torch.ones(1)}, place)


def _other_rank(folder: Path) -> None:
    place = folder / "run" / CONFIG
    place.write_text(json.dumps(json.loads(place.read_text()) | {"rank": 3}))


def _recipe_cut_off(folder: Path) -> None:
    place = folder / "run" / "recipe.yaml"
    place.write_text(place.read_text().partition("deepspeed:")[0] + "deepspeed:")


FOLDERS: dict[str, Case] = {
    **{
        f"{name}, {how}": bad(says, change=run(file(f"run/{name}", content)))
        for name in ("base.json", "summary.json")
        for how, (says, content) in {
            "empty": ("is not valid JSON", b""),
            "cut off": ("is not valid JSON", b'{"name": '),
            "a list": ("holds a list; expected a JSON object", b"[]"),
            "binary": ("cannot be read as text", bytes(range(256))),
            "nested 10,000 deep": ("its brackets nest too deep", b"[" * 10_000),
        }.items()
    },
    "base.json without a fingerprint": bad(
        "run/base.json does not say name, fingerprint, dtype and data of the base.",
        change=run(file("run/base.json", '{"name": "x", "dtype": "float32"}')),
    ),
    "base.json with a number for a name": bad(
        "run/base.json does not say name, fingerprint, dtype and data of the base.",
        change=run(file("run/base.json", '{"name": 5, "fingerprint": 5, "dtype": 5}')),
    ),
    "metrics.jsonl with a list": bad(
        "not the metrics of a step: [1]. Delete the line.", change=run(file("run/metrics.jsonl", '[1]\n{"step": 1}\n'))
    ),
    "metrics.jsonl without steps": bad(
        "not the metrics of a step: {}. Delete the line.", change=run(file("run/metrics.jsonl", '{}\n{"step": 1}\n'))
    ),
    "metrics.jsonl of bytes": bad(
        "run/metrics.jsonl cannot be read: 'utf-8' codec can't decode byte 0x80",
        change=run(file("run/metrics.jsonl", bytes(range(256)))),
    ),
    "metrics.jsonl with a last line cut off": bad("", change=run(file("run/metrics.jsonl", '{"step": 1}\n{"ste'))),
    **{
        f"{name} in the place of {what}": bad(says, change=run(instead(place)))
        for says, name, what, place in (
            ("is a file, and a folder is expected there", "a file", "checkpoints/", "checkpoints"),
            ("is a file, and a folder is expected there", "a file", "adapter/", "adapter"),
            ("is a file, and a folder is expected there", "a file", "tensorboard/", "tensorboard"),
            ("cannot be read", "a folder", "metrics.jsonl", "metrics.jsonl"),
            ("cannot be read", "a folder", "base.json", "base.json"),
            ("cannot be read", "a folder", "summary.json", "summary.json"),
        )
    },
    "recipe.yaml cut off": bad("training.deepspeed: got None (nothing), expected text.", change=run(_recipe_cut_off)),
    "a run of another recipe": bad(
        "run holds a run of another recipe (training.lr: 0.001 there, 0.01", "training.lr=1e-2", change=run()
    ),
    "resume=never, and there are checkpoints": bad(
        "output.resume is never, and run/checkpoints/step-3 is there. Choose", "output.resume=never", change=run()
    ),
    "resume=must, and there are none": bad(
        "output.resume is must, and run/checkpoints has no checkpoint.", "output.resume=must"
    ),
    "checkpoints without a recipe": bad(
        "run has checkpoints but no recipe.yaml; choose another output.dir.",
        change=run(lambda folder: (folder / "run" / "recipe.yaml").unlink()),
    ),
    "a folder of other things": bad(
        "output.dir run is no run folder and is not empty: it holds thesis.tex.", change=file("run/thesis.tex", "x")
    ),
    **{
        f"{command[0]}: {name}": Case(says, (), change, command=command)
        for command in (MERGE, EVALUATE)
        for name, says, change in (
            ("no run", "run is no run folder: it has no recipe.yaml", file("run/x", "x")),
            ("an adapter cut off", "To get it back, start the same training command again", run(cut(ADAPTER))),
            (
                "an adapter cut off, without checksums",
                "adapter_model.safetensors is damaged",
                run(without_manifest(cut(ADAPTER))),
            ),
            (
                "an adapter of text",
                "adapter_model.safetensors is damaged",
                run(without_manifest(file(f"run/{ADAPTER}", "x"))),
            ),
            (
                "an adapter of NaN",
                "holds values that are not finite: the training diverged",
                run(without_manifest(with_tensors(torch.nan))),
            ),
            ("a tensor missing", "mlp.down_proj.slot_A", run(without_manifest(_without_one))),
            ("a tensor too many", "base_model.model.x.slot_B.down", run(without_manifest(_with_one_more))),
            (
                "adapter_config.json cut off",
                "adapter_config.json is not valid JSON",
                run(without_manifest(cut(CONFIG))),
            ),
            (
                "adapter_config.json a list",
                "adapter_config.json holds a list",
                run(without_manifest(file(f"run/{CONFIG}", "[]"))),
            ),
            (
                "adapter_config.json with another rank",
                "says rank 3, and the run's recipe 2",
                run(without_manifest(_other_rank)),
            ),
            (
                "no adapter",
                "adapter_model.safetensors is missing. To get it back",
                run(lambda folder: shutil.rmtree(folder / "run" / "adapter")),
            ),
            ("base.json a list", "run/base.json holds a list", run(file("run/base.json", "[]"))),
        )
    },
    "merge: an unknown step": Case(
        "run has no checkpoint of step 9; kept: 3, 2.", ("--step", "9"), run(), command=MERGE
    ),
    "merge: a step below 0": Case(
        "run has no checkpoint of step -1; kept: 3, 2.", ("--step", "-1"), run(), command=MERGE
    ),
    "merge: --out that exists": Case(
        "merged exists already; name a new folder, or delete it.", (), both(run(), file("merged/x", "x")), command=MERGE
    ),
    "merge: --out under a file": Case(
        "rows.jsonl/x cannot be made: rows.jsonl is a file. Choose another place.",
        (),
        run(),
        command=("merge", "run", "--out", "rows.jsonl/x"),
    ),
    "merge: --out of a name too long": Case(
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        (),
        run(),
        command=("merge", "run", "--out", "x" * 300),
    ),
    "merge: a genome of a plain run": Case(
        "--genome is for a supernet, and run is none (adapter.paths is not",
        ("--genome", "run/base.json"),
        run(),
        command=MERGE,
    ),
    "evaluate: an unknown split": Case(
        "argument --split: invalid choice: 'train' (choose from 'test',",
        (),
        run(),
        command=("evaluate", "run", "--split", "train"),
    ),
    "evaluate: no test rows": Case(
        "The recipe has no test rows: set data.test.", (), run(), command=("evaluate", "run")
    ),
    "evaluate: a merged model that is none": Case(
        "none holds no merged model (no config.json): write one by `glora-llm",
        ("--merged", "none"),
        run(),
        command=EVALUATE,
    ),
    "search: no supernet": Case(
        "A search needs a supernet, and this recipe trains fixed paths: set", (), run(), command=("search", "run")
    ),
}
