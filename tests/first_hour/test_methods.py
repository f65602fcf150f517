"""Every method of PEFT is in the table: as one that trains (run/test_methods_walk.py), or refused with the reason."""

from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from glora_llm.adapters.config import LORA_VARIANTS
from glora_llm.adapters.methods import METHODS, REFUSED, REFUSED_STARTS
from glora_llm.cli import main
from tests.in_process import alone  # noqa: F401 - a fixture

SHORT = [
    "adapter.slots=null", "training.steps=2", "training.warmup=0", "training.deepspeed=zero0", "data.max_rows=64",
    "data.validation=4", "data.max_test_rows=4", "output.save_every=2",
]  # fmt: skip


def test_every_method_of_peft_is_in_one_table() -> None:
    of_peft = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"glora_llm"}
    presets = {name for name, method in METHODS.items() if method.tuner}
    assert of_peft - METHODS.keys() - REFUSED.keys() == {METHODS[name].tuner for name in presets} - METHODS.keys()
    assert METHODS.keys() - of_peft == {"full", *presets, *LORA_VARIANTS} - of_peft
    assert REFUSED.keys() <= of_peft


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
