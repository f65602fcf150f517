"""Every method of PEFT trains, is scored and merges, or is refused before training, with the reason."""

from pathlib import Path

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from glora_llm.adapters.config import LORA_VARIANTS
from glora_llm.adapters.methods import METHODS, REFUSED, REFUSED_STARTS
from glora_llm.cli import main
from glora_llm.evaluation.trained import load_adapted
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from tests.in_process import alone, train_in_process  # noqa: F401 - a fixture

SHORT = [
    "adapter.slots=null", "training.steps=2", "training.warmup=0", "training.deepspeed=zero0", "data.max_rows=64",
    "data.validation=4", "data.max_test_rows=4", "output.save_every=2",
]  # fmt: skip
NEEDED = {  # arguments without which a method does not fit layers of 64 inputs, as its own message says
    "c3a": {"block_size": 32},
    "road": {"group_size": 16},
    "waveft": {"n_frequency": 64},
}
OF_IMAGES = {name for name, method in METHODS.items() if "text" not in method.kinds}
TRAINED = sorted(METHODS.keys() - {"glora", "full", "adapter_fusion"} - OF_IMAGES)  # those have tests of their own


def test_every_method_of_peft_is_in_one_table() -> None:
    of_peft = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"glora_llm"}
    presets = {name for name, method in METHODS.items() if method.tuner}
    assert of_peft - METHODS.keys() - REFUSED.keys() == {METHODS[name].tuner for name in presets} - METHODS.keys()
    assert METHODS.keys() - of_peft == {"full", *presets, *LORA_VARIANTS} - of_peft
    assert REFUSED.keys() <= of_peft


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_is_scored_and_merges_or_says_why_not(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [f"adapter.method={name}", f"output.dir={out}", *SHORT]
    if name in NEEDED:
        arguments.append(f"adapter.peft={NEEDED[name]}")
    if METHODS[name].unmerged:
        assert train_in_process("tiny_cpu", *arguments, "merge.after_training=true") == 2
        assert METHODS[name].unmerged in capsys.readouterr().err
    assert train_in_process("tiny_cpu", *arguments, "merge.after_training=false") == 0
    assert ("merge      An adapter" in capsys.readouterr().out) == bool(METHODS[name].unmerged)
    assert main(["evaluate", str(out), "--split", "test"]) == 0
    assert main(["merge", str(out), "--out", str(tmp_path / "merged")]) == (2 if METHODS[name].unmerged else 0)
    require_trained_on(out, [*arguments, "merge.after_training=false"])


@torch.no_grad()
def logits(run: Path) -> Tensor:
    model = load_adapted(make_plan(RunFolder(run).recipe()), run / "adapter")
    found: Tensor = model(input_ids=torch.arange(24).reshape(2, 12)).logits
    return found


def require_trained_on(run: Path, arguments: list[str]) -> None:
    """Train on from the run's adapter with a learning rate of zero and another seed: the function is that of the run.

    Whatever a method draws at random and does not save must come again; AdaLoRA prunes ranks at any learning rate.
    """
    out = run.with_name("further")
    further = [f"adapter.weights={run / 'adapter'}", f"output.dir={out}", "training.seed=5", "training.lr=1e-30"]
    assert train_in_process("tiny_cpu", *arguments, *further) == 0
    if "adapter.method=adalora" not in arguments:
        torch.testing.assert_close(logits(out), logits(run), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [*REFUSED_STARTS, "pissa_niter_16", "kaiming", "kasa"])
def test_a_start_is_refused_before_training(start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Starts that change the base, or are never computed; and names that PEFT does not know."""
    given = "adapter.peft={kasa_config: {}}" if start == "kasa" else f"adapter.peft={{init_lora_weights: {start}}}"
    arguments = ["adapter.method=lora", given, f"output.dir={tmp_path / 'run'}", *SHORT]
    assert main(["train", "--recipe", "tiny_cpu", *arguments]) == 2
    said = capsys.readouterr().err
    reasons = REFUSED_STARTS | {"kaiming": "'kaiming' is unknown", "kasa": REFUSED_STARTS["pissa"]}
    assert reasons[start.partition("_niter_")[0]] in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_training(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "--recipe", "tiny_cpu", f"adapter.method={name}", f"output.dir={tmp_path / 'run'}", *SHORT]) == 2
    )
    assert f"adapter.method {name} does not train here: {REFUSED[name]}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*METHODS, *REFUSED])
