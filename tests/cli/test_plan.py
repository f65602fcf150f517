"""`glora-llm plan`: a table of at most 100 columns, JSON, and one message for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glora_llm.cli import main
from glora_llm.models.random_llama import SMALL, llama_config

ROOT = Path(__file__).parents[2]
# Each prints its CPU seconds at the end; the first also the modules that it has loaded by then.
DRY_RUN = """
import json, os, sys
from glora_llm.cli import main
assert main(["train", "--recipe", "tiny_cpu", "--dry-run", "output.dir=" + sys.argv[1]]) == 0
print(json.dumps([sum(os.times()[:2]), [name for name in sys.modules if name != "__main__"]]))
"""
IMPORTS = """
import contextlib, importlib, json, os, sys
from glora_llm.launch.quiet import quiet_libraries
quiet_libraries()
for name in json.load(sys.stdin):
    with contextlib.suppress(Exception):  # some are no modules that can be asked for by name
        importlib.import_module(name)
print(json.dumps([sum(os.times()[:2]), []]))
"""


def seconds(code: str, argument: Path, given: str = "") -> tuple[float, list[str]]:
    """Run code in a process of its own; return its CPU seconds and what it prints beside them."""
    result = subprocess.run(
        [sys.executable, "-c", code, str(argument)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, input=given, capture_output=True, text=True, check=True,
    )  # fmt: skip
    taken, names = json.loads(result.stdout.splitlines()[-1])
    return taken, names


def test_a_dry_run_takes_little_more_than_its_imports(tmp_path: Path) -> None:
    """Measured 1.15 times as much (docs/plan.md); twice would be a second forward pass, or data that are read again."""
    seconds(DRY_RUN, tmp_path)  # makes model and data in the cache
    dry, names = seconds(DRY_RUN, tmp_path)
    imports, _ = seconds(IMPORTS, tmp_path, json.dumps(names))
    assert len(names) > 1000 and dry < 2 * imports


def test_a_recipe_is_planned_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "tiny_cpu", "--gpus", "2", "--gpu-memory", "8"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "tiny_cpu on 2 GPUs of 8.0 GB, in float32: computed, not measured" in printed
    assert "by slot  A 8,192, B 8,192, C 1,024, E 1,024" in printed
    assert "while training; fits into 8.0 GB beside 1 GB for CUDA's context" in printed
    assert "no GPU was named" in printed or "peaks are known in bfloat16 alone" in printed


def test_json_has_every_phase_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "tiny_cpu", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["trained"]["total"] == 18_432 and values["peak"]["bytes"] == max(p["total"] for p in values["memory"])
    assert values["machine"]["on_cpu"] and values["time"]["seconds"] > values["time"]["least_seconds"] > 0


def test_a_configuration_without_weights_and_data_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama_config(SMALL).save_pretrained(tmp_path / "model")
    changes = [f"model.name_or_path={tmp_path / 'model'}", f"output.dir={tmp_path / 'run'}"]
    assert main(["plan", "--recipe", "llama2_glora", "--gpus", "1", "--gpu", "H100", *changes]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 full rows of 1,024 tokens" in printed and "yahma/alpaca-cleaned is not on this machine" in printed
    assert not (tmp_path / "run").exists()


def test_a_method_whose_step_is_not_followed(capsys: pytest.CaptureFixture[str]) -> None:
    """The rest is told, as the least; it is not said that it fits."""
    arguments = ["--recipe", "tiny_cpu", "adapter.method=fourierft", "adapter.slots=null", "--gpus", "1"]
    assert main(["plan", *arguments, "--gpu-memory", "24"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    said = "at least: activations, logits and workspace of a step of adapter.method fourierft are not computed"
    assert said in printed and "fits" not in printed and "activations " not in printed.partition("peak ")[0]
    assert main(["plan", *arguments, "--gpu-memory", "1.0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["unmodelled"] and found["changes"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "tiny_cpy"], "Did you mean 'tiny_cpu'?"),
        (["--recipe", "tiny_cpu", "--gpus", "0"], "--gpus is '0'; expected a number of GPUs above 0"),
        (["--recipe", "tiny_cpu", "--gpus", "all"], "--gpus is 'all'"),
        (["--recipe", "tiny_cpu", "--gpu-memory", "much"], "--gpu-memory is 'much'; expected GB of one GPU"),
        (["--recipe", "tiny_cpu", "--gpu-memory", "inf"], "--gpu-memory is 'inf'"),
        (["--recipe", "tiny_cpu", "--gpus", "3"], "Use global_batch 12 or 24"),
        (["--recipe", "tiny_cpu", "adapter.rank=1000"], "Set adapter.rank to 64 or less"),
        (["--recipe", "tiny_cpu", "training.lrr=1"], "Did you mean 'lr'?"),
        (["--recipe", "llama2_glora", "--gpus", "1"], "the hub cannot be reached"),
        (["--recipe", "vit_cifar10_dense"], "Give data that are here"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_what_is_wrong_is_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("error: ") and not shown.out
